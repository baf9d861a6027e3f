"""`bertfast export`: a model for transformers and what reads its folders, for ONNX, or as `torch.export` has it.

A folder is what `transformers` opens strictly, and so what servers of embeddings open. The two graphs are of
`transformers`' own code, on padded batches of any size and length: they need no library of ours where they run.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from tyro.conf import Positional

from bertfast.models.bert import BertForMultipleChoice
from bertfast.models.extensions import ExtendedBertConfig
from bertfast.models.files import class_named_by, load, read_config, report_differences, resolve, save

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_OUTPUTS = {
    "BertModel": ("last_hidden_state", "pooler_output"),
    "BertForPreTraining": ("prediction_logits", "seq_relationship_logits"),
    "BertForQuestionAnswering": ("start_logits", "end_logits"),
}


@dataclass
class ExportSettings:
    """What to export, and as what.

    Attributes:
        model_name_or_path: Folder or hub id of a model.
        output_dir: Folder for the result.
        to: transformers writes config.json, model.safetensors and the tokenizer; onnx also model.onnx, checked by ONNX
            Runtime; torch-export also model.pt2.
    """

    model_name_or_path: Positional[str]
    output_dir: Positional[str]
    to: Literal["transformers", "onnx", "torch-export"] = "transformers"


def export(settings: ExportSettings) -> Path:
    """Write what is asked for, check it against the model it is of, and return its path.

    Raises ValueError if `transformers` has no such model, or what was written gives other outputs.
    """
    source = resolve(settings.model_name_or_path)
    kind = _kind(source)
    _check_packages(settings.to)
    folder = Path(settings.output_dir)
    if folder.exists() and folder.samefile(source):
        raise ValueError(f"{folder} is the model itself: name another folder")
    model, missing, unexpected = load(kind, source)
    report_differences(model, str(source), missing, unexpected)
    save(model, folder)
    for name in _TOKENIZER:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    theirs = _open_strictly(folder, kind.__name__)
    if settings.to == "transformers":
        print(f"{folder} holds a {kind.__name__} that transformers opens")
        return folder
    model = _Outputs(theirs, _OUTPUTS.get(kind.__name__, ("logits",))).eval()
    chooses = kind is BertForMultipleChoice
    write = _to_onnx if settings.to == "onnx" else _to_program
    path, run = write(model, folder, _example(theirs.config, 3, 11, chooses), _dynamic_shapes(theirs.config, chooses))
    sizes = ((2, 7), (1, 3), (5, 16))
    worst = max(_difference(model, run, _example(theirs.config, *size, chooses)) for size in sizes)
    if not worst < 1e-4:
        raise ValueError(f"{path} gives other outputs than the model, by {worst:.3g}: do not use it")
    print(f"{path} gives the model's outputs to {worst:.1g}, for batches and lengths of any size")
    return path


class _Outputs(nn.Module):
    """A model whose arguments and results are tensors."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(outputs[name] for name in self.names if outputs.get(name) is not None)


def _kind(folder: Path) -> type[PreTrainedModel]:
    config = read_config(folder)
    if isinstance(config, ExtendedBertConfig):
        alone = [name for name in config.extensions if getattr(config, name)]
        raise ValueError(
            f"{folder} has {', '.join(alone)}, which transformers does not know: it can be used here alone"
        )
    return class_named_by(config)


def _check_packages(to: str) -> None:
    """ImportError where something is missing that writes or checks; before anything is written."""
    for name in ("onnxruntime", "onnxscript") if to == "onnx" else ():
        if find_spec(name) is None:
            raise ImportError(f"an export to {to} requires {name}: `pip install bertfast[onnx]`")


def _open_strictly(folder: Path, name: str) -> nn.Module:
    import transformers

    model, told = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    wrong = [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]
    if wrong:
        raise ValueError(f"transformers does not open {folder} strictly: {', '.join(map(str, wrong[:5]))}")
    return model.eval()


def _example(config, rows: int, columns: int, chooses: bool) -> tuple[Tensor, Tensor, Tensor]:
    """A batch whose rows have different lengths; with two choices each, where the model chooses."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 2, columns) if chooses else (rows, columns)
    ids = torch.randint(config.vocab_size, shape, generator=generator)
    lengths = torch.randint(1, columns + 1, (*shape[:-1], 1), generator=generator)
    return ids, (torch.arange(columns) < lengths).long(), ids % config.type_vocab_size


def _difference(model: nn.Module, run, example: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        return max((a - b).abs().max().item() for a, b in zip(run(*example), model(*example), strict=True))


def _dynamic_shapes(config, chooses: bool) -> tuple[dict[int, torch.export.Dim], ...]:
    rows = torch.export.Dim("batch")
    columns = torch.export.Dim("length", max=config.max_position_embeddings)
    shape = {0: rows, 1: torch.export.Dim("choices"), 2: columns} if chooses else {0: rows, 1: columns}
    return (shape,) * len(_INPUTS)


def _to_program(model: _Outputs, folder: Path, example: tuple[Tensor, ...], shapes: tuple):
    with torch.no_grad():
        program = torch.export.export(model, example, dynamic_shapes=shapes, strict=False)
    path = folder / "model.pt2"
    torch.export.save(program, path)
    return path, torch.export.load(path).module()


def _to_onnx(model: _Outputs, folder: Path, example: tuple[Tensor, ...], shapes: tuple):
    import onnxruntime

    path = folder / "model.onnx"
    with torch.no_grad():
        torch.onnx.export(
            model,
            example,
            path,
            input_names=[*_INPUTS],
            output_names=[name for name, _ in zip(model.names, model(*example), strict=False)],
            dynamic_shapes=shapes,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> list[Tensor]:
        feeds = {name: x.numpy() for name, x in zip(_INPUTS, inputs, strict=True)}
        return [torch.from_numpy(x) for x in session.run(None, feeds)]

    return path, run
