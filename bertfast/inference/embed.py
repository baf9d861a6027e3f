"""`bertfast embed`: embeddings of texts, written to disk in parts so that memory use stays constant.

Shapes: S texts, T packed tokens, H hidden size, D embedding size (H, or a multiple if layers are concatenated).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from bertfast.data.text_files import COMPRESSIONS, STANDARD_INPUT, read_lines, read_standard_input, require_file
from bertfast.encoder import encode
from bertfast.encoder.packed_linear import is_frozen
from bertfast.inference.frozen import CALIBRATION_EXAMPLES, freeze_on_cpu, require_own_precision
from bertfast.models.bert import BertModel
from bertfast.models.extensions import (
    LAYERS,
    BertFeaturesForTokenClassification,
    select_layers,
    warn_of_few_layers,
)
from bertfast.models.files import model_files, resolve
from bertfast.ops.matmul import caches_shapes
from bertfast.runtime.atomic_write import atomic_path, reserve
from bertfast.runtime.cuda_graph import GraphRunner, capture_for, side_stream
from bertfast.runtime.extras import install_command
from bertfast.runtime.malloc import give_freed_memory_back
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder
from bertfast.runtime.precision import autocast, choose_device, choose_precision, half, require_finite
from bertfast.runtime.settings import Count, Settings, flag, given, refuse_without_effect
from bertfast.runtime.signals import RunStopped
from bertfast.runtime.tensor_file import write_tensors
from bertfast.tasks.columns import Columns, Text
from bertfast.tasks.features import CutTexts, Features, ModelInputs, batches_by_length, tokenize
from bertfast.tasks.pretrained import open_model, sequence_length
from bertfast.tasks.settings import ComputeSettings
from bertfast.tasks.tables import SUFFIXES as TABLE_SUFFIXES
from bertfast.tasks.tables import read_chunks

logger = logging.getLogger("bertfast")

_CONTENTS = ("part-[0-9]*.safetensors", "part-[0-9]*.parquet")
Pooling = Literal["cls", "mean", "none"]
_TEXT_SUFFIXES = tuple(f".txt{compression}" for compression in COMPRESSIONS)


@dataclass(frozen=True, kw_only=True)
class EmbedSettings(Settings):
    """Texts to embed, the model, and the output.

    Attributes:
        model_name_or_path: Folder or hub id of a model and its tokenizer.
        output_dir: Folder for part-00000 and so on. The same command again continues an interrupted run.
        overwrite_output_dir: Replace the parts of another run in --output-dir.
        input_file: A .txt file with one text per line, blank lines included, read as a stream, or a .tsv, .csv or
            .jsonl file, or a .json list. If not given, or "-": lines of standard input.
        text_column: Column of the text. If not given: sentence, sentence1 or text.
        text_pair_column: Column of the second text of a pair. If not given: sentence2 if there is one.
        pooling: mean: average over all tokens; cls: the [CLS] token; or none: one embedding per token.
        layers: Hidden states to use: embeddings, second-to-last, last, mean-last-four, concat-last-four or mean-all.
        output_format: safetensors, or parquet (one row per text).
        texts_per_part: Texts per output file.
        max_seq_length: Maximum sequence length in tokens, beyond which inputs are truncated. If not given: the model's
            number of positions.
        compute: Device, precision and batch size of inference.
    """

    model_name_or_path: str
    output_dir: str
    overwrite_output_dir: bool = False
    input_file: str | None = None
    text_column: str | None = None
    text_pair_column: str | None = None
    pooling: Pooling = "mean"
    layers: str = "last"
    output_format: Literal["safetensors", "parquet"] = "safetensors"
    texts_per_part: Count = 10_000
    max_seq_length: Count | None = None
    compute: ComputeSettings = field(default_factory=ComputeSettings)

    def validate(self) -> None:
        if self.layers not in LAYERS:
            raise ValueError(f"--layers must be one of {', '.join(LAYERS)}, got {self.layers!r}")
        if self.output_format == "parquet" and self.pooling == "none":
            raise ValueError("parquet has one row per text: for --pooling none use --output-format safetensors")
        if self.reads_lines:
            columns = {"--text-column", "--text-pair-column"}
            refuse_without_effect(sorted(columns.intersection(given(self))), "the input is lines, not a table")

    @property
    def reads_lines(self) -> bool:
        """Whether each line of the input is a text; else the input is a table."""
        return self.input_file in (None, "-") or self.input_file.endswith(_TEXT_SUFFIXES)


def embed(settings: EmbedSettings) -> Path:
    """Write the embeddings of all texts, in their order: one for each line of text or row of a table, also if blank.

    Each part holds `embeddings`, fp32 [S, D], and `rows`, int64 [S], the number of each text's row (or line) from 1.
    With pooling "none", embeddings are fp32 [T, D], and `cu_seqlens`, int64 [S + 1], says where the tokens of each text
    start, and T. Parquet files have the columns `row`, `id` if the table has it, and `embeddings`, of lists.

    Returns:
        The output folder.

    Raises:
        ValueError: There is no text, one cannot be read, or the folder has parts of other texts, another model or other
            settings.
    """
    if settings.input_file not in (None, "-"):
        require_file(settings.input_file, "--input-file")
    if settings.output_format == "parquet" and find_spec("pyarrow") is None:
        raise ImportError(f"--output-format parquet requires pyarrow: {install_command('parquet')}")
    device = choose_device(settings.compute.device)
    model, tokenizer = open_model(BertModel, settings.model_name_or_path, False, device, settings.compute.precision)
    require_own_precision(model, settings.compute.precision)
    warn_of_few_layers("--layers", settings.layers, model.config)
    max_length = sequence_length(settings.max_seq_length, model.config)
    origin = _origin(settings, max_length, choose_precision(device, settings.compute.precision, model.config))
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        begin = check_contents(folder, origin, _CONTENTS, overwrite=settings.overwrite_output_dir)
        rows = _rows(settings)
        calibration = list(islice(rows, CALIBRATION_EXAMPLES))
        rows = chain(calibration, rows)
        chunks = iter(lambda: list(islice(rows, settings.texts_per_part)), [])
        first = next(chunks, None)
        source = STANDARD_INPUT if settings.input_file in (None, "-") else f"--input-file {settings.input_file}"
        if first is None:
            raise ValueError(f"{source} is empty: it needs one text per line")
        begin()
        # The first texts, even if their embeddings are there already, so that those of the others do not depend on it.
        first_features = tokenize(tokenizer, [row.text for row in calibration], max_length)
        freeze_on_cpu(model, settings.compute.precision, first_features, lambda x: encode(model, x.packed(model)))
        cut = CutTexts(source, max_length)
        with (
            _interruptible(settings),
            tqdm(desc="embed", unit="text") as bar,
        ):  # not before the checks, as it would stand above an error
            for part, chunk in enumerate(chain([first], chunks)):
                path = folder / f"part-{part:05}.{settings.output_format}"
                if not _is_whole(path, [row.number for row in chunk]):
                    features = tokenize(tokenizer, [row.text for row in chunk], max_length)
                    cut.add(features)
                    tensors = compute_embeddings(model, features, settings)
                    tensors["rows"] = torch.tensor([row.number for row in chunk])
                    _write(path, tensors, [row.id for row in chunk])
                    give_freed_memory_back()  # else memory use grows with the number of parts
                bar.update(len(chunk))
        cut.report()
    return folder


@contextmanager
def _interruptible(settings: EmbedSettings) -> Iterator[None]:
    """Have Ctrl-C say how to go on if that is not with the same command, as standard input cannot be read again."""
    try:
        yield
    except KeyboardInterrupt:
        if settings.input_file not in (None, "-"):
            raise
        raise RunStopped(
            f"interrupted: {settings.output_dir} has the embeddings of a part of {STANDARD_INPUT}; to compute all, "
            "save the texts to a file, and pass it with --input-file and --overwrite-output-dir",
            130,
        ) from None


def _origin(settings: EmbedSettings, max_length: int, precision: str) -> Origin:
    """Return what the embeddings depend on."""
    inputs = {"--model-name-or-path": model_files(resolve(settings.model_name_or_path))}
    if settings.input_file in (None, "-"):
        existing = (path for pattern in _CONTENTS for path in Path(settings.output_dir).glob(pattern))
        if any(existing) and not settings.overwrite_output_dir:
            raise ValueError(
                f"{settings.output_dir} has embeddings, perhaps of other texts than those on standard input: "
                "choose another --output-dir, or pass --overwrite-output-dir to replace them"
            )
    else:
        inputs["--input-file"] = [Path(settings.input_file)]
    names = ("text_column", "text_pair_column", "pooling", "layers", "output_format", "texts_per_part")
    values = {flag(name): getattr(settings, name) for name in names}
    return Origin(inputs, values | {"--max-seq-length": max_length, "--precision": precision}, "embed")


@torch.no_grad()
def compute_embeddings(model: BertModel, features: Features, settings: EmbedSettings) -> dict[str, Tensor]:
    """Compute the embeddings of tokenized texts, as `embed` writes them."""
    layers, concatenated = select_layers(settings.layers, model.config)
    size = model.config.hidden_size * (len(layers) if concatenated else 1)
    per_token = settings.pooling == "none"
    embeddings = torch.empty(len(features.token_ids) if per_token else len(features), size)
    precision = choose_precision(model.device, settings.compute.precision, model.config)
    only_last = layers == [model.config.num_hidden_layers]

    def forward(inputs: ModelInputs) -> Tensor:
        with autocast(model.device, precision):
            hidden_states: list[Tensor] = []
            last = encode(model, inputs.packed(model), hidden_states=None if only_last else hidden_states)
        chosen = [state.float() for state in ([last] if only_last else [hidden_states[layer] for layer in layers])]
        return torch.cat(chosen, 1) if concatenated else torch.stack(chosen).mean(0)

    capture = capture_for(model, precision, enabled=settings.compute.cuda_graph)
    runner = GraphRunner(forward, model.device, capture)
    bucketed = capture is not None or (not is_frozen(model) and caches_shapes(model.device, half(precision)))
    with side_stream(model.device):
        for rows in batches_by_length(features, settings.compute.eval_tokens):
            lengths = features.lengths[rows]
            inputs = features.model_inputs(rows, labels=False, bucketed=bucketed)
            hidden = runner(inputs)[: lengths.sum()].cpu()  # without padding slots
            require_finite(hidden, model.name_or_path)
            if per_token:
                _scatter_tokens(embeddings.numpy(), features, rows, hidden.numpy())
            elif settings.pooling == "cls":
                embeddings[rows] = hidden[np.cumsum(lengths) - lengths]  # the first token of each text
            else:
                embeddings[rows] = torch.segment_reduce(hidden, "mean", lengths=torch.from_numpy(lengths))
    return {"embeddings": embeddings} | ({"cu_seqlens": torch.from_numpy(features.cu_seqlens)} if per_token else {})


@torch.no_grad()
def cached_hidden_states(
    folder: Path, model: BertFeaturesForTokenClassification, features: Features, precision: str, tokens: int
) -> np.ndarray:
    """Return the hidden states that `model` trains on, computed once and memory-mapped from a file.

    Args:
        folder: Folder of the cache. The name of a file is a hash of the encoder's weights, the layers, the precision
            and the token ids.
        model: The feature-based model.
        features: Tokenized sentences.
        precision: Precision of the encoder.
        tokens: Approximate tokens per batch.

    Returns:
        fp32 [T, layers, H].
    """
    cache_key = hashlib.sha256(repr([model.layer_indices, precision]).encode())
    arrays = (features.token_ids, features.token_type_ids, features.cu_seqlens)
    for array in (*(weight.numpy(force=True) for weight in model.bert.state_dict().values()), *arrays):
        cache_key.update(np.ascontiguousarray(array).view(np.uint8).data)
    path = folder / f"{cache_key.hexdigest()[:32]}.npy"
    shape = (len(features.token_ids), len(model.layer_indices), model.config.hidden_size)
    cached = _open_cache(path, shape)
    if cached is None:
        with atomic_path(path) as temporary:
            hidden_states = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
            reserve(temporary)
            for rows in batches_by_length(features, tokens):
                inputs = features.model_inputs(rows, labels=False).to(model.device)
                with autocast(model.device, precision):
                    states = model.features(inputs.packed(model)).float().cpu().numpy()
                _scatter_tokens(hidden_states, features, rows, states)
            hidden_states.flush()
        cached = np.lib.format.open_memmap(path, "r")
    return cached


def _open_cache(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Memory-map cached hidden states; None: there are none, or the file is damaged."""
    if not path.exists():
        return None
    with suppress(OSError, ValueError):
        cached: np.ndarray = np.lib.format.open_memmap(path, "r")
        if cached.shape == shape:
            return cached
    logger.warning("%s is damaged: it is computed again", path)
    return None


def _scatter_tokens(out: np.ndarray, features: Features, rows: np.ndarray, values: np.ndarray) -> None:
    """Write the values of the tokens of the batch of `rows` into those of all tokens, `out` [T, …]."""
    for row, part in zip(rows, features.split_by_example(rows, values), strict=True):
        out[features.cu_seqlens[row] : features.cu_seqlens[row + 1]] = part


@dataclass(frozen=True)
class _Row:
    """A text, or pair of texts, its row's number from 1, and the row's id if the file has any."""

    number: int
    text: Text
    id: str | None = None


def _rows(settings: EmbedSettings) -> Iterator[_Row]:
    """Yield the rows of the input, of which only a part is in memory at a time."""
    path = settings.input_file
    if path is None or settings.reads_lines:
        lines = read_standard_input() if path in (None, "-") else read_lines(Path(path))
        yield from (_Row(number, line.rstrip("\r\n")) for number, line in lines)
        return
    if not path.endswith(TABLE_SUFFIXES):
        raise ValueError(f"--input-file {path}: give text as .txt, or a table as .tsv, .csv, .jsonl or .json")
    columns = None
    for table in read_chunks(path, settings.texts_per_part):
        columns = columns or Columns.choose(table, settings.text_column, settings.text_pair_column, None)
        columns.require_all_texts(table, text_named=settings.text_column is not None)
        ids = [None] * len(table) if table.rows.ids is None else table.rows.ids
        for number, text, row_id in zip(table.rows.numbers, columns.texts(table), ids, strict=True):
            yield _Row(number, text, None if row_id is None else str(row_id))


def _is_whole(path: Path, numbers: list[int]) -> bool:
    """Return whether a part exists and holds the rows of these numbers; warn of a part that does not."""
    if not path.exists():
        return False
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:  # raises if the size is not that of the header
                found = file.get_tensor("rows").tolist()
        else:
            from pyarrow import parquet

            found = parquet.read_table(path, columns=["row"])["row"].to_pylist()
    except (SafetensorError, OSError, ValueError) as error:  # those of pyarrow are OSError or ValueError
        logger.warning("%s is damaged (%s): its embeddings are computed again", path, error)
        return False
    if found != numbers:
        logger.warning("%s has %d rows, not %d: its embeddings are computed again", path, len(found), len(numbers))
        return False
    return True


def _write(path: Path, tensors: dict[str, Tensor], ids: list[str | None]) -> None:
    """Write a part; `ids` are those of its texts, all None if they have none."""
    if path.suffix == ".safetensors":
        with atomic_path(path) as temporary:
            write_tensors(tensors, temporary)
        return
    import pyarrow
    from pyarrow import parquet

    embeddings = tensors["embeddings"].numpy()
    lists = pyarrow.FixedSizeListArray.from_arrays(embeddings.ravel(), embeddings.shape[1])
    named = {"id": ids} if any(row_id is not None for row_id in ids) else {}
    columns = {"row": tensors["rows"].numpy()} | named | {"embeddings": lists}
    with atomic_path(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)
