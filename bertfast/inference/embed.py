"""`bertfast embed`: embeddings of texts, written to disk in parts so that memory use stays constant.

Shapes: S texts, T packed tokens, H hidden size, D embedding size (H, or a multiple if layers are concatenated).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from bertfast.data.text_files import STANDARD_INPUT, is_standard_input, require_file, require_input
from bertfast.encoder import encode
from bertfast.inference.embed_settings import EmbedSettings
from bertfast.inference.embedding_files import (
    CONTENTS,
    RANGES,
    Part,
    is_whole,
    quantize_embeddings,
    read_ranges,
    require_size,
    require_space_for_ids,
    write_part,
    write_ranges,
)
from bertfast.inference.frozen import CALIBRATION_EXAMPLES, freeze_on_cpu, uncaptured_buckets
from bertfast.inference.sentence_encoder import Encoder, chosen_layers, joined, open_encoder
from bertfast.inference.text_rows import TextRow, no_texts, read_text_rows, source_name
from bertfast.models.bert import BertModel
from bertfast.models.extensions import (
    BertFeaturesForTokenClassification,
)
from bertfast.models.pooling import pool
from bertfast.models.sentence_modules import SentenceModules
from bertfast.runtime.atomic_write import atomic_path, reserve
from bertfast.runtime.completion import mark_complete
from bertfast.runtime.cuda_graph import GraphRunner, capture_for, side_stream
from bertfast.runtime.extras import install_command
from bertfast.runtime.malloc import give_freed_memory_back
from bertfast.runtime.output_folder import Origin, check_contents, locked_folder
from bertfast.runtime.precision import autocast, choose_device, choose_precision, require_finite
from bertfast.runtime.settings import flag
from bertfast.runtime.signals import RunStopped
from bertfast.tasks.columns import Text
from bertfast.tasks.features import BUCKETED, CutTexts, Features, ModelInputs, batches_by_length

logger = logging.getLogger("bertfast")

__all__ = ["EmbedSettings", "cached_hidden_states", "compute_embeddings", "embed", "embed_texts"]


def embed(settings: EmbedSettings) -> Path:
    """Write the embeddings of all texts, in their order: one for each line of text or row of a table, also if blank.

    Each part holds `embeddings`, fp32 [S, D] or as --output-precision says, and `rows`, int64 [S], the number of each
    text's row (or line) from 1. With pooling "none", embeddings are [T, D], and `cu_seqlens`, int64 [S + 1], says where
    the tokens of each text start, and T. If the table has ids, safetensors files have them as a JSON list in the entry
    `ids` of their metadata. Parquet files have the columns `row`, `id` if the table has it, and `embeddings`, of lists.
    With npy, the arrays are files: part-00000.npy of embeddings, rows-00000.npy, ids-00000.npy, cu_seqlens-00000.npy.

    Returns:
        The output folder.

    Raises:
        ValueError: There is no text, one cannot be read, or the folder has parts of other texts, another model or other
            settings.
    """
    require_input(settings.input_file)
    ranges = None
    if settings.ranges_file is not None:
        require_file(settings.ranges_file, "--ranges-file")
        ranges = read_ranges(Path(settings.ranges_file))
    if settings.output_format == "parquet" and find_spec("pyarrow") is None:
        raise ImportError(f"--output-format parquet requires pyarrow: {install_command('parquet')}")
    device = choose_device(settings.compute.device)
    encoder = open_encoder(settings, device)
    if ranges is not None:
        require_size(ranges, f"--ranges-file {settings.ranges_file}", encoder.size)
    origin = _origin(settings, encoder)
    folder = Path(settings.output_dir)
    with locked_folder(folder):
        begin = check_contents(folder, origin, CONTENTS, overwrite=settings.overwrite_output_dir)
        rows = read_text_rows(settings)
        calibration = list(islice(rows, CALIBRATION_EXAMPLES))
        rows = chain(calibration, rows)
        chunks = iter(lambda: list(islice(rows, settings.texts_per_part)), [])
        first = next(chunks, None)
        if first is None:
            raise no_texts(settings.input_file)
        begin()
        encoder.log(settings)
        # The first texts, even if their embeddings are there already, so that those of the others do not depend on it.
        first_features = encoder.features([row.text for row in calibration])
        model = encoder.model
        freeze_on_cpu(model, settings.compute.precision, first_features, lambda x: encode(model, x.packed(model)))
        cut = CutTexts(source_name(settings.input_file), encoder.max_length)
        with (
            _interruptible(settings),
            tqdm(desc="embed", unit="text") as bar,
        ):  # not before the checks, as it would stand above an error
            mark_complete(folder, _write_parts(settings, encoder, ranges, chain([first], chunks), cut, bar.update))
        cut.report()
    return folder


def _write_parts(
    settings: EmbedSettings,
    encoder: Encoder,
    ranges: np.ndarray | None,
    chunks: Iterable[list[TextRow]],
    cut: CutTexts,
    advance: Callable[[int], object],
) -> int:
    """Write the parts that are not there yet, one for each chunk of rows; return the number of rows.

    Args:
        settings: Settings of the command.
        encoder: The model.
        ranges: The ranges of --ranges-file, if any.
        chunks: The rows of each part.
        cut: Counts the texts that are cut.
        advance: Called with the number of rows of each part.
    """
    folder, count = Path(settings.output_dir), 0
    if ranges is None:
        ranges = _ranges_of_first_part(settings, encoder.size)
    for number, chunk in enumerate(chunks):
        path = folder / f"part-{number:05}.{settings.output_format}"
        needs_ranges = settings.has_ranges and ranges is None
        if needs_ranges or not is_whole(path, [row.number for row in chunk]):
            require_space_for_ids(path, [row.number for row in chunk], [row.id for row in chunk])
            features = encoder.features([row.text for row in chunk])
            cut.add(features)
            found = compute_embeddings(encoder.model, features, settings, encoder.modules, encoder.num_skipped)
            embeddings = found["embeddings"].numpy()
            if needs_ranges:
                ranges = write_ranges(folder / RANGES, embeddings)
            embeddings = quantize_embeddings(embeddings, settings.output_precision, ranges)
            starts = found["cu_seqlens"].numpy() if "cu_seqlens" in found else None
            rows = np.array([row.number for row in chunk])
            write_part(path, Part(embeddings, rows, [row.id for row in chunk], starts))
            give_freed_memory_back()  # else memory use grows with the number of parts
        advance(len(chunk))
        count += len(chunk)
    return count


def _ranges_of_first_part(settings: EmbedSettings, size: int) -> np.ndarray | None:
    """Return the ranges of the first part, of `size` elements, if embeddings need them and they are there."""
    path = Path(settings.output_dir, RANGES)
    if not settings.has_ranges or not path.exists():
        return None
    try:
        ranges = read_ranges(path)
        require_size(ranges, str(path), size)
    except ValueError as error:
        logger.warning("%s: computed again", error)
        return None
    return ranges


@contextmanager
def _interruptible(settings: EmbedSettings) -> Iterator[None]:
    """Have Ctrl-C say how to go on if that is not with the same command, as standard input cannot be read again."""
    try:
        yield
    except KeyboardInterrupt:
        if not is_standard_input(settings.input_file):
            raise
        raise RunStopped(
            f"interrupted: {settings.output_dir} has the embeddings of a part of {STANDARD_INPUT}; to compute all, "
            "save the texts to a file, and pass it with --input-file and --overwrite-output-dir",
            130,
        ) from None


def _origin(settings: EmbedSettings, encoder: Encoder) -> Origin:
    """Return what the embeddings depend on."""
    inputs = {"--model-name-or-path": encoder.files}
    if settings.ranges_file is not None:
        inputs["--ranges-file"] = [Path(settings.ranges_file)]
    file = settings.input_file or "-"
    if is_standard_input(file):
        existing = (path for pattern in CONTENTS for path in Path(settings.output_dir).glob(pattern))
        if any(existing) and not settings.overwrite_output_dir:
            raise ValueError(
                f"{settings.output_dir} has embeddings, perhaps of other texts than those on standard input: "
                "choose another --output-dir, or pass --overwrite-output-dir to replace them"
            )
    else:
        inputs["--input-file"] = [Path(file)]
    names = ("text_column", "text_pair_column", "layers", "output_format", "output_precision", "texts_per_part")
    values: dict[str, Any] = {flag(name): getattr(settings, name) for name in names}
    values |= {"--pooling": joined(encoder.modules), "--normalization": encoder.normalization}
    model = encoder.model
    values |= {"--prompt": encoder.prompt, "--max-seq-length": encoder.max_length}
    values["--precision"] = choose_precision(model.device, settings.compute.precision, model.config)
    return Origin(inputs, values, "embed")


def embed_texts(encoder: Encoder, settings: EmbedSettings, texts: list[Text], cut: CutTexts) -> np.ndarray:
    """Return the embeddings of texts or pairs of texts, fp32 [S, D]; on a CPU, the model's weights are packed first.

    Args:
        encoder: The model.
        settings: Layers, precision and batch size.
        texts: The texts.
        cut: Counts those that are cut.
    """
    features = encoder.features(texts)
    cut.add(features)
    model = encoder.model
    freeze_on_cpu(model, settings.compute.precision, features, lambda x: encode(model, x.packed(model)))
    embeddings: np.ndarray = compute_embeddings(model, features, settings, encoder.modules, encoder.num_skipped)[
        "embeddings"
    ].numpy()
    return embeddings


@torch.no_grad()
def compute_embeddings(
    model: BertModel,
    features: Features,
    settings: EmbedSettings,
    modules: SentenceModules | None = None,
    num_skipped: int = 0,
) -> dict[str, Tensor]:
    """Compute the embeddings of tokenized texts in fp32.

    Args:
        model: The encoder.
        features: The texts.
        settings: Layers, precision and batch size; without modules also the pooling, mean by default.
        modules: Pooling, and what follows it.
        num_skipped: Number of first tokens that are not pooled.

    Returns:
        `embeddings`, fp32 [S, D], or with pooling "none" fp32 [T, D] and `cu_seqlens`, int64 [S + 1].
    """
    if modules is None:
        modules = SentenceModules(Path()).changed(settings.pooling, settings.normalization, str(model.name_or_path))
    layers, size = chosen_layers(settings, model)
    concatenated = size > model.config.hidden_size
    per_token = settings.pooling == "none"
    shape = (len(features.token_ids), size) if per_token else (len(features), modules.size_of(size))
    embeddings = torch.empty(shape)
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
    buckets = uncaptured_buckets(model, precision) if capture is None else BUCKETED
    with side_stream(model.device):
        for rows in batches_by_length(features, settings.compute.tokens_per_batch(model.device)):
            lengths = features.lengths[rows]
            inputs = features.model_inputs(rows, labels=False, buckets=buckets)
            hidden = runner(inputs)[: lengths.sum()].cpu()  # without padding slots
            require_finite(hidden, model.name_or_path)
            if per_token:
                _scatter_tokens(embeddings.numpy(), features, rows, hidden.numpy())
            else:
                pooled = pool(hidden, torch.from_numpy(lengths), modules.pooling, num_skipped)
                for module in modules.after:
                    pooled = module(pooled)
                embeddings[rows] = pooled
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
