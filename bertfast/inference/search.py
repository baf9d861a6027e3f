"""`bertfast search`: the vectors of a folder of `bertfast embed` that are nearest to queries.

All vectors are compared, chunk by chunk, so that memory use does not depend on how many there are.

Shapes: Q queries, K results of a query, D embedding size.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch

from bertfast.data.text_files import is_standard_input, require_file, require_input
from bertfast.inference.embed import embed_texts
from bertfast.inference.embed_settings import EmbedSettings, Pooling
from bertfast.inference.frozen import examples_to_begin
from bertfast.inference.sentence_encoder import Encoder, joined, open_encoder
from bertfast.inference.text_rows import TextRow, no_texts, read_row_groups, read_text_rows, source_name
from bertfast.inference.vector_folder import VectorFolder
from bertfast.models.extensions import LAYERS
from bertfast.models.files import resolve
from bertfast.models.sentence_folder import read_sentence_modules
from bertfast.runtime.output_folder import Origin, differences_from
from bertfast.runtime.precision import choose_device
from bertfast.runtime.settings import Count, Settings, checked, flag
from bertfast.tasks.columns import Text
from bertfast.tasks.features import CutTexts
from bertfast.tasks.most_similar import Similarity, most_similar
from bertfast.tasks.settings import ComputeSettings

logger = logging.getLogger("bertfast")

_CHUNK = 2**22  # elements of the vectors that are compared at a time, 16 MB
_QUERIES = 512  # that are compared at a time

__all__ = ["Hit", "SearchSettings", "search", "search_vectors"]


class Hit(NamedTuple):
    """A vector that was found: its text's row from 1, the row's id if it has any, and its similarity to the query."""

    row: int
    id: str | None
    score: float


@dataclass(frozen=True, kw_only=True)
class SearchSettings(Settings):
    """Queries, the vectors that are searched, and the model of both.

    Attributes:
        embeddings_dir: Folder that bertfast embed has written, in any format and precision.
        model_name_or_path: Folder or hub id of the model that computed the vectors.
        input_file: Queries: a .txt file with one per line, or a .tsv, .csv or .jsonl file, or a .json list. If not
            given, or "-": lines of standard input.
        text_column: Column of the query. If not given: sentence, sentence1 or text.
        top_k: Results per query.
        print_texts: Print the texts that are found, too, from the file that bertfast embed has read.
        similarity: cosine: of the vectors' angle; dot: dot product; auto: the similarity_fn_name of the model's
            config_sentence_transformers.json, and cosine if it has none.
        prompt: Text to put before each query.
        prompt_name: Prompt of the model's config_sentence_transformers.json to put before each query, or none. If not
            given: query if there is one, else its default_prompt_name.
        max_seq_length: Maximum length of a query in tokens, beyond which it is truncated. If not given: that of the
            model's sentence_bert_config.json or tokenizer, and at most the model's number of positions.
        compute: Device, precision and batch size of inference.
    """

    exclusive = ("prompt", "prompt_name")

    embeddings_dir: str
    model_name_or_path: str
    input_file: str | None = None
    text_column: str | None = None
    top_k: Count = 10
    print_texts: bool = False
    similarity: Literal["auto", "cosine", "dot"] = "auto"
    prompt: str | None = None
    prompt_name: str | None = None
    max_seq_length: Count | None = None
    compute: ComputeSettings = field(default_factory=ComputeSettings)


def search(settings: SearchSettings) -> None:
    """Print one JSON object per query: its row from 1, its id if it has any, and `hits`, from the most similar on.

    Each hit has the row of a text that was embedded, its id if it has any, the score, and with --print-texts the text.
    Lines of standard input are answered when they have arrived, in batches if they arrive fast.

    Raises:
        ValueError: There is no query, or one cannot be read; the vectors are damaged, not complete or of another model;
            or texts to print have changed.
    """
    require_input(settings.input_file)
    folder = VectorFolder.open(Path(settings.embeddings_dir))
    embedding = _embed_settings(settings, folder)
    of_texts = _settings_of_texts(folder, embedding) if settings.print_texts else None
    encoder = open_encoder(embedding, choose_device(settings.compute.device))
    _require_same_model(folder, embedding, encoder)
    similarity = _similarity(settings, encoder)
    logger.info("searching %d vectors of %s by %s", len(folder), folder.path, similarity)
    cut = CutTexts(source_name(settings.input_file), encoder.max_length)
    least, is_empty = 1, True
    if is_standard_input(settings.input_file):
        least = examples_to_begin(encoder.model, settings.compute.precision)
    for rows in read_row_groups(embedding, _QUERIES, least):
        is_empty = False
        queries = embed_texts(encoder, embedding, [row.text for row in rows], cut)
        found = search_vectors(folder, queries, settings.top_k, similarity)
        texts = {} if of_texts is None else _texts(of_texts, {hit.row for hits in found for hit in hits})
        for row, hits in zip(rows, found, strict=True):
            print(json.dumps(_result(row, hits, texts), ensure_ascii=False))
        sys.stdout.flush()
    if is_empty:
        raise no_texts(settings.input_file)
    cut.report()


def search_vectors(
    folder: VectorFolder | Path | str,
    queries: np.ndarray | Sequence[Sequence[float]],
    top_k: int = 10,
    similarity: Similarity = "cosine",
) -> list[list[Hit]]:
    """Return the vectors that are most similar to queries, from the most similar on; equal ones by row.

    Args:
        folder: Folder that `bertfast embed` has written. Vectors of int8 and uint8 are compared as the middle of their
            steps, and bits as -1 and 1.
        queries: float [Q, D], embeddings of the same model in full precision.
        top_k: K, results per query; fewer if there are fewer vectors.
        similarity: How vectors are compared.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is none of `bertfast embed`, is damaged or not complete, or its vectors have another size than
            the queries; or an argument is not as described.
    """
    if similarity not in get_args(Similarity):
        raise ValueError(f"similarity must be cosine or dot, got {similarity!r}")
    top_k = checked("top_k", Count, top_k)
    vectors = _query_vectors(queries)
    if not isinstance(folder, VectorFolder):
        folder = VectorFolder.open(Path(folder))
    size = vectors.shape[1]
    folder.require_width(size, "the queries are")
    hits: list[list[Hit]] = []
    for start in range(0, len(vectors), _QUERIES):
        batch = torch.from_numpy(np.array(vectors[start : start + _QUERIES]))
        chunks = (torch.from_numpy(chunk) for chunk in folder.chunks(max(_CHUNK // size, 1), size))
        scores, indices = most_similar(batch, chunks, top_k, similarity, str(folder.path))
        rows = indices + 1
        ids = folder.ids(rows.ravel().tolist())
        for values, found in zip(scores.tolist(), rows.tolist(), strict=True):
            hits.append([Hit(row, ids.get(row), score) for score, row in zip(values, found, strict=True)])
    return hits


def _query_vectors(queries: np.ndarray | Sequence[Sequence[float]]) -> np.ndarray:
    """Return the embeddings of queries as fp32 [Q, D]; ValueError if they are none."""
    try:
        vectors = np.asarray(queries, np.float32)
    except (TypeError, ValueError):  # texts, or lists of different lengths
        found = f"{queries!r:.60}"
    else:
        if vectors.ndim == 2 and vectors.shape[1] and np.isfinite(vectors).all():
            return vectors
        found = f"shape {[*vectors.shape]}"
    raise ValueError(f"queries must be finite and of shape [Q, D], got {found}: give embeddings, as TextEncoder.encode")


def _embed_settings(settings: SearchSettings, folder: VectorFolder) -> EmbedSettings:
    """Return the settings with which queries are embedded: pooling, normalisation and layers of the vectors."""
    recorded = folder.settings
    pooling, normalization = recorded.get("--pooling"), recorded.get("--normalization")
    layers = recorded.get("--layers")
    prompt_name = settings.prompt_name
    if prompt_name is None and settings.prompt is None:
        known = read_sentence_modules(resolve(settings.model_name_or_path)).prompts
        prompt_name = "query" if "query" in known else None
    return EmbedSettings.of(
        model_name_or_path=settings.model_name_or_path,
        output_dir=settings.embeddings_dir,
        input_file=settings.input_file,
        text_column=settings.text_column,
        # What is not among the choices is the model's own, or is refused as a difference from the record.
        pooling=pooling if pooling in get_args(Pooling) else "auto",
        normalization=normalization if normalization in ("l2", "none") else "auto",
        layers=layers if isinstance(layers, str) and layers in LAYERS else "last",
        prompt=settings.prompt,
        prompt_name=prompt_name,
        max_seq_length=settings.max_seq_length,
        texts_per_part=_QUERIES,
        compute=settings.compute,
    )


def _require_same_model(folder: VectorFolder, settings: EmbedSettings, encoder: Encoder) -> None:
    """Raise ValueError if the vectors of a folder are not those that the encoder gives."""
    values = {"--pooling": joined(encoder.modules), "--normalization": encoder.normalization}
    values["--layers"] = settings.layers
    origin = Origin({"--model-name-or-path": encoder.files}, values, "embed")
    differences = differences_from(folder.path, origin)
    if differences:
        raise ValueError(
            f"{folder.path} has vectors of another model than {settings.model_name_or_path}: {'; '.join(differences)}; "
            "give the model that computed them, or embed the texts again"
        )
    folder.require_width(encoder.size, f"{settings.model_name_or_path} gives vectors")


def _similarity(settings: SearchSettings, encoder: Encoder) -> Similarity:
    chosen = encoder.saved_modules.similarity if settings.similarity == "auto" else settings.similarity
    if chosen == "cosine":
        return "cosine"
    if chosen == "dot":
        return "dot"
    raise ValueError(
        f"{settings.model_name_or_path} has the similarity_fn_name {chosen!r:.40}, which is not supported: choose "
        "--similarity cosine or dot"
    )


def _settings_of_texts(folder: VectorFolder, settings: EmbedSettings) -> EmbedSettings:
    """Return settings with which the texts of the vectors are read.

    Raises:
        FileNotFoundError: Their file is gone.
        ValueError: It has changed, or they were standard input.
    """
    file = folder.input_file
    if file is None:
        raise ValueError(f"--print-texts: {folder.path} has the vectors of standard input, of which no text is kept")
    require_file(file, "--print-texts: the file of the texts,")
    differences = differences_from(folder.path, Origin({"--input-file": [file]}, {}, "embed"))
    if differences:
        raise ValueError(f"--print-texts: {differences[0]}; embed the texts again, or leave the flag out")
    names = ("text_column", "text_pair_column")
    recorded = {name: folder.settings.get(flag(name)) for name in names}
    columns = {name: value for name, value in recorded.items() if isinstance(value, str)}
    return EmbedSettings.of(
        model_name_or_path=settings.model_name_or_path,
        output_dir=settings.output_dir,
        input_file=str(file),
        texts_per_part=_QUERIES,
        **columns,
    )


def _texts(settings: EmbedSettings, rows: set[int]) -> dict[int, Text]:
    """Return the texts of some rows, of which the file is read up to the last."""
    return {row.number: row.text for row in islice(read_text_rows(settings), max(rows)) if row.number in rows}


def _result(row: TextRow, hits: list[Hit], texts: Mapping[int, Text]) -> dict[str, object]:
    """Return what is printed for a query; ids are left out if there are none."""
    found = [
        {name: value for name, value in hit._asdict().items() if value is not None}
        | ({"text": texts[hit.row]} if hit.row in texts else {})
        for hit in hits
    ]
    return {"row": row.number} | ({} if row.id is None else {"id": row.id}) | {"hits": found}
