"""`bertfast export`: write a model in Hugging Face format, as an ONNX graph or as a `torch.export` program.

The folder can be loaded by `transformers` and by everything that reads its format, such as embedding servers. Graphs
are traced from the code of `transformers`, on padded batches of any size and length, so running them does not require
bertfast.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from tyro.conf import Positional

from bertfast.data.tokenizer import TOKENIZER_FILES
from bertfast.encoder import has_token_types
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.families import architecture_of
from bertfast.models.files import class_named_by, load, model_files, read_config, report_differences, resolve, save
from bertfast.runtime.atomic_write import atomic_path
from bertfast.runtime.extras import install_command
from bertfast.runtime.output_folder import Origin, locked_folder, staged_contents
from bertfast.runtime.settings import Settings
from bertfast.tasks.pretrained import open_tokenizer

_GRAPHS = {"onnx": "model.onnx", "torch-export": "model.pt2"}
_CONTENTS = ("config.json", "generation_config.json", "model*.safetensors*", *TOKENIZER_FILES, *_GRAPHS.values())
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS = (
    "last_hidden_state",
    "pooler_output",
    "logits",
    "prediction_logits",
    "seq_relationship_logits",
    "start_logits",
    "end_logits",
)


Graph = Callable[..., Sequence[Tensor]]
"""Runs an exported graph on input_ids, attention_mask and, if it has types, token_type_ids; returns its outputs."""
Shapes = tuple[tuple[dict[int, torch.export.Dim], ...]]
"""Dynamic dimensions of each input."""


@dataclass(frozen=True)
class ExportSettings(Settings):
    """What to export, and to which format.

    Attributes:
        model_name_or_path: Folder or hub id of a model.
        output_dir: Folder to write to.
        overwrite_output_dir: Replace the export of another model in the folder.
        to: transformers: config.json, model.safetensors and the tokenizer; onnx: also model.onnx, checked with ONNX
            Runtime; torch-export: also model.pt2.
    """

    model_name_or_path: Positional[str]
    output_dir: Positional[str]
    overwrite_output_dir: bool = False
    to: Literal["transformers", "onnx", "torch-export"] = "transformers"


def export(settings: ExportSettings) -> Path:
    """Export a model and compare the outputs of the result with those of the model.

    Returns:
        The folder or, for a graph, its file.

    Raises:
        ValueError: `transformers` has no such model, the outputs differ, or the folder has another model.
        ImportError: A package is missing that the export requires.
    """
    source = resolve(settings.model_name_or_path)
    model_class = _model_class(source)
    if any(path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        open_tokenizer(source, read_config(source))  # raises if it is damaged, or of another model
    _check_packages(settings.to)
    origin = Origin({"--model-name-or-path": model_files(source)}, command="export")
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        overwrite = settings.overwrite_output_dir
        with staged_contents(folder, origin, _CONTENTS, keeps=lambda error: False, overwrite=overwrite) as building:
            for path in (path for pattern in _CONTENTS for path in building.glob(pattern)):
                path.unlink()  # of a run that was killed
            model, missing, unexpected = load(model_class, source)
            report_differences(model, str(source), missing, unexpected)
            save(model, building)
            name, message = _export(source, building, model_class, settings.to)
            if not overwrite:  # what is there is of the same model
                for graph in _GRAPHS.values():
                    if (folder / graph).exists() and not (building / graph).exists():
                        shutil.copyfile(folder / graph, building / graph)
        print(f"{folder / name} {message}")
        return folder / name


def _export(source: Path, folder: Path, model_class: type[PreTrainedModel], to: str) -> tuple[str, str]:
    """Complete the export of a model to a folder that has its weights; return the name of the file and its result."""
    for path in (path for pattern in TOKENIZER_FILES for path in source.glob(pattern)):
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)
    hf = _open_strictly(folder, model_class.__name__)
    if to == "transformers":
        return "", f"holds a {model_class.__name__} that transformers can load"
    multiple_choice = model_class.__name__.endswith("ForMultipleChoice")
    traced = _Outputs(hf, _example(hf.config, 1, 2, multiple_choice)).eval()
    write, name = _to_onnx if to == "onnx" else _to_program, _GRAPHS[to]
    example = _example(hf.config, 3, 11, multiple_choice)
    with atomic_path(folder / name) as temporary:
        run = write(traced, temporary, example, _dynamic_shapes(hf.config, multiple_choice))
        sizes = ((2, 7), (1, 3), (5, 16))
        worst = max(_difference(traced, run, _example(hf.config, *size, multiple_choice)) for size in sizes)
        if not worst < 1e-4:
            raise ValueError(
                f"{name} is not written: its outputs differ from those of the model by up to {worst:.3g}, so "
                "use another format with --to"
            )
    return name, f"gives the outputs of the model to within {worst:.1g}, for any batch size and sequence length"


class _Outputs(nn.Module):
    """A model with positional tensor arguments that returns a tuple of its outputs, those for `example`."""

    def __init__(self, model: nn.Module, example: tuple[Tensor, ...]):
        super().__init__()
        self.model = model
        with torch.no_grad():
            outputs = model(**dict(zip(_INPUTS, example, strict=False)))
        self.names = [name for name in _OUTPUTS if outputs.get(name) is not None]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(**dict(zip(_INPUTS, inputs, strict=False)))
        return tuple(outputs[name] for name in self.names)


def _model_class(folder: Path) -> type[PreTrainedModel]:
    config = read_config(folder)
    if isinstance(config, ExtendedBertConfig):
        unsupported = [name for name in config.extensions if getattr(config, name)]
        raise ValueError(
            f"{folder} has {', '.join(unsupported)}, which transformers does not have: so only bertfast can run it"
        )
    return class_named_by(config, folder)


def _check_packages(to: str) -> None:
    """Raise ImportError if a package is missing, before anything is written."""
    for name in ("onnxruntime", "onnxscript") if to == "onnx" else ():
        if find_spec(name) is None:
            raise ImportError(f"an export to {to} requires {name}: {install_command('onnx')}")


def _open_strictly(folder: Path, name: str) -> PreTrainedModel:
    """Load a model with transformers, and raise ValueError unless all of its weights match."""
    import transformers

    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    mismatches = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if mismatches:
        raise ValueError(
            f"transformers does not find the weights it expects in {folder}: {', '.join(map(str, mismatches[:5]))}"
        )
    model.eval()
    return cast(PreTrainedModel, model)


def _example(config: PretrainedConfig, rows: int, columns: int, multiple_choice: bool) -> tuple[Tensor, ...]:
    """Return input_ids, attention_mask and, if the model has token types, token_type_ids of rows of different lengths.

    They are int64 [rows, columns]; for multiple choice [rows, 2, columns].
    """
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 2, columns) if multiple_choice else (rows, columns)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    lengths = torch.randint(1, columns + 1, (*shape[:-1], 1), generator=generator)
    inputs = ids, (torch.arange(columns) < lengths).long()
    return (*inputs, ids % config.type_vocab_size) if has_token_types(config) else inputs


def _difference(model: nn.Module, run: Graph, example: tuple[Tensor, ...]) -> float:
    """Return the largest absolute difference between the outputs of a model and those of its graph."""
    with torch.no_grad():
        return max(float((a - b).abs().max()) for a, b in zip(run(*example), model(*example), strict=True))


def _dynamic_shapes(config: PretrainedConfig, multiple_choice: bool) -> Shapes:
    rows = torch.export.Dim("batch")
    columns = torch.export.Dim("length", max=architecture_of(config).max_positions(config))
    shape = {0: rows, 1: torch.export.Dim("choices"), 2: columns} if multiple_choice else {0: rows, 1: columns}
    return ((shape,) * len(_example(config, 1, 1, multiple_choice)),)  # all of them are one variadic argument


def _to_program(model: nn.Module, path: Path, example: tuple[Tensor, ...], shapes: Shapes) -> Graph:
    """Write the `torch.export` program of a model, and return it."""
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    torch.export.save(program, path)
    return torch.export.load(path).module()


def _to_onnx(model: _Outputs, path: Path, example: tuple[Tensor, ...], shapes: Shapes) -> Graph:
    """Write the ONNX graph of a model, and return a function that runs it."""
    import onnxruntime

    with torch.no_grad():
        torch.onnx.export(
            model,
            example,
            path,
            input_names=_INPUTS[: len(example)],
            output_names=model.names,
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), None, ["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(_INPUTS, inputs, strict=False)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return run
