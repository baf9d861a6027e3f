"""Parts of embeddings on disk: their formats, the ids of their rows, and precisions below fp32.

Shapes: S texts, N embeddings (S, or the number of tokens), D embedding size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from bertfast.runtime.atomic_write import atomic_path
from bertfast.runtime.tensor_file import write_tensors

logger = logging.getLogger("bertfast")

OutputFormat = Literal["safetensors", "parquet", "npy"]
OutputPrecision = Literal["float32", "int8", "uint8", "binary", "ubinary"]

RANGES = "ranges.npy"
"""File of the smallest and the largest value of each element, fp32 [2, D], between which int8 and uint8 count."""
CONTENTS = (
    "part-[0-9]*.safetensors",
    "part-[0-9]*.parquet",
    *(f"{name}-[0-9]*.npy" for name in ("part", "rows", "ids", "cu_seqlens")),
    RANGES,
)
"""Patterns of the files that `embed` writes."""
_LARGEST_PADDED_IDS = 100_000_000  # bytes of a file of ids that is mostly padding
_LARGEST_HEADER = 50_000_000  # characters; the library safetensors reads no header of 100 MB


@dataclass(frozen=True, eq=False)
class Part:
    """The embeddings of some texts.

    Attributes:
        embeddings: [N, D] in any precision, D / 8 of bits.
        rows: int64 [S], the number of each text's row from 1.
        ids: The ids of the rows, all None if the input has none.
        cu_seqlens: int64 [S + 1], where the tokens of each text start; None: there is one embedding per text.
    """

    embeddings: np.ndarray
    rows: np.ndarray
    ids: list[str | None]
    cu_seqlens: np.ndarray | None = None

    @property
    def has_ids(self) -> bool:
        """Whether the rows have ids."""
        return any(row_id is not None for row_id in self.ids)


def quantize_embeddings(embeddings: np.ndarray, precision: OutputPrecision, ranges: np.ndarray | None) -> np.ndarray:
    """Quantise embeddings, as the function of this name of sentence-transformers does.

    Args:
        embeddings: fp32 [N, D].
        precision: int8 and uint8 divide the range of each element into 256 steps; binary and ubinary are a bit per
            element, set if it is positive, eight to an int8 or uint8.
        ranges: fp32 [2, D], the smallest and the largest value of each element; only int8 and uint8 need it.

    Returns:
        fp32, int8 or uint8 [N, D], or [N, ⌈D / 8⌉] of bits.
    """
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        bits: np.ndarray = np.packbits(embeddings > 0, axis=-1)
        return bits if precision == "ubinary" else (bits ^ np.uint8(128)).view(np.int8)
    assert ranges is not None
    steps = (ranges[1] - ranges[0]) / 255
    values: np.ndarray = np.clip(np.floor((embeddings - ranges[0]) / np.where(steps == 0, 1, steps)), 0, 255)
    return values.astype(np.uint8) if precision == "uint8" else (values - 128).astype(np.int8)


def dequantize_embeddings(
    embeddings: np.ndarray, precision: OutputPrecision, ranges: np.ndarray | None, size: int
) -> np.ndarray:
    """Return what quantised embeddings stand for.

    Args:
        embeddings: [N, D] or [N, ⌈D / 8⌉], what `quantize_embeddings` returned.
        precision: Its precision.
        ranges: Its ranges, which only int8 and uint8 need.
        size: D.

    Returns:
        fp32 [N, D]: the middle of each value's step, or -1 and 1 for bits.
    """
    if precision == "float32":
        return embeddings
    if precision in ("binary", "ubinary"):
        packed = embeddings if precision == "ubinary" else embeddings.view(np.uint8) ^ np.uint8(128)
        return np.unpackbits(packed, axis=1, count=size).astype(np.float32) * 2 - 1
    assert ranges is not None
    steps = (ranges[1] - ranges[0]) / 255
    middle = 0.5 if precision == "uint8" else 128.5
    values: np.ndarray = (embeddings.astype(np.float32) + np.float32(middle)) * steps + ranges[0]
    return values


def read_ranges(path: Path) -> np.ndarray:
    """Read a file of ranges, see `RANGES`; ValueError if it is none."""
    try:
        with path.open("rb") as file:  # not np.load, which would open archives and recommend to unpickle others
            ranges: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, MemoryError):
        raise ValueError(f"{path} is damaged or no .npy file of numbers: give a ranges.npy of bertfast embed") from None
    if ranges.dtype != np.float32 or ranges.ndim != 2 or len(ranges) != 2 or not np.isfinite(ranges).all():
        raise ValueError(f"{path} must hold float32 of shape [2, D], the smallest and the largest values")
    above = np.flatnonzero(ranges[0] > ranges[1])
    if len(above):
        raise ValueError(
            f"{path}: the smallest value of element {above[0]}, {ranges[0, above[0]]:g}, is above its largest, "
            f"{ranges[1, above[0]]:g}: the first row must hold the smallest values"
        )
    return ranges


def require_size(ranges: np.ndarray, source: str, size: int) -> None:
    """Raise ValueError, naming the source of ranges, if they are not those of embeddings of `size` elements."""
    if ranges.shape[1] != size:
        raise ValueError(
            f"{source} has the ranges of {ranges.shape[1]} elements, and the embeddings have {size}: "
            "give that of embeddings of the same model"
        )


def write_ranges(path: Path, embeddings: np.ndarray) -> np.ndarray:
    """Compute and write the ranges of embeddings, fp32 [N, D], and return them.

    Raises:
        ValueError: There is only one embedding.
    """
    if len(embeddings) < 2:
        raise ValueError(
            "one text has no ranges for --output-precision int8 or uint8: give those of other texts with --ranges-file"
        )
    ranges = np.stack([embeddings.min(0), embeddings.max(0)])
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, ranges)
    return ranges


def require_space_for_ids(path: Path, numbers: list[int], ids: list[str | None]) -> None:
    """Check that the file of a part has space for the ids of its rows, before their embeddings are computed.

    Args:
        path: The part's file.
        numbers: The numbers of the rows.
        ids: Their ids.

    Raises:
        ValueError: They are too long for safetensors' metadata, or would make a huge file of numpy, where each takes
            the space of the longest.
    """
    if all(row_id is None for row_id in ids):
        return
    if path.suffix == ".safetensors" and len(json.dumps(ids)) > _LARGEST_HEADER:
        raise ValueError(f"{path} has no space for so many ids: choose a smaller --texts-per-part")
    lengths = [len(row_id or "") for row_id in ids]
    size = 4 * max(lengths, default=0) * len(ids)
    if path.suffix == ".npy" and size > max(_LARGEST_PADDED_IDS, 16 * sum(lengths)):
        longest = lengths.index(max(lengths))
        raise ValueError(
            f"row {numbers[longest]} has an id of {lengths[longest]:,} characters, and in numpy's format {len(ids):,} "
            f"ids would take as many each, {size / 1e9:.1f} GB: choose --output-format parquet or safetensors, or "
            "shorter ids"
        )


def write_part(path: Path, part: Part) -> None:
    """Write a part in the format of the suffix of `path`; the file of that name is written last."""
    {".safetensors": _write_safetensors, ".parquet": _write_parquet, ".npy": _write_arrays}[path.suffix](path, part)


def is_whole(path: Path, numbers: list[int]) -> bool:
    """Return whether a part exists and holds the rows of these numbers; warn of a part that does not."""
    if not path.exists():
        return False
    try:
        found = read_rows(path)
    except (SafetensorError, OSError, ValueError, EOFError) as error:  # those of pyarrow are OSError or ValueError
        logger.warning("%s is damaged (%s): its embeddings are computed again", path, error)
        return False
    if found != numbers:
        logger.warning("%s has %d rows, not %d: its embeddings are computed again", path, len(found), len(numbers))
        return False
    return True


def _write_safetensors(path: Path, part: Part) -> None:
    arrays = {"embeddings": part.embeddings, "rows": part.rows}
    if part.cu_seqlens is not None:
        arrays["cu_seqlens"] = part.cu_seqlens
    entries = {"ids": json.dumps(part.ids)} if part.has_ids else {}
    with atomic_path(path) as temporary:
        write_tensors({name: torch.from_numpy(array) for name, array in arrays.items()}, temporary, entries)


def _rows_of_safetensors(path: Path) -> list[int]:
    with safe_open(path, framework="np") as file:  # raises if the size is not that of the header
        rows: list[int] = file.get_tensor("rows").tolist()
    return rows


def _write_parquet(path: Path, part: Part) -> None:
    import pyarrow
    from pyarrow import parquet

    lists = pyarrow.FixedSizeListArray.from_arrays(part.embeddings.ravel(), part.embeddings.shape[1])
    columns = {"row": part.rows} | ({"id": part.ids} if part.has_ids else {}) | {"embeddings": lists}
    with atomic_path(path) as temporary:
        parquet.write_table(pyarrow.table(columns), temporary)


def _rows_of_parquet(path: Path) -> list[int]:
    from pyarrow import parquet

    rows: list[int] = parquet.read_table(path, columns=["row"])["row"].to_pylist()
    return rows


def _companion(path: Path, name: str) -> Path:
    """Return the file of other arrays of a part: "rows-00000.npy" next to "part-00000.npy"."""
    return path.with_name(path.name.replace("part", name, 1))


def _write_arrays(path: Path, part: Part) -> None:
    arrays: dict[str, np.ndarray | None] = {
        "rows": part.rows,
        "ids": np.array([row_id or "" for row_id in part.ids]) if part.has_ids else None,
        "cu_seqlens": part.cu_seqlens,
        "part": part.embeddings,
    }
    for name, array in arrays.items():
        if array is not None:
            with atomic_path(_companion(path, name)) as temporary, temporary.open("wb") as file:
                np.save(file, array)


def _rows_of_arrays(path: Path) -> list[int]:
    embeddings = np.load(path, mmap_mode="r")  # raises if the size is not that of the header
    rows: list[int] = np.load(_companion(path, "rows")).tolist()
    starts = _companion(path, "cu_seqlens")
    if len(embeddings) != (np.load(starts)[-1] if starts.exists() else len(rows)):
        raise ValueError(f"it has {len(embeddings)} embeddings")
    return rows


def _chunks_of_arrays(path: Path, size: int) -> Iterator[np.ndarray]:
    embeddings = np.load(path, mmap_mode="r")
    return (np.array(embeddings[start : start + size]) for start in range(0, len(embeddings), size))


def _chunks_of_safetensors(path: Path, size: int) -> Iterator[np.ndarray]:
    with safe_open(path, framework="np") as file:
        embeddings = file.get_slice("embeddings")
        count = embeddings.get_shape()[0]
        for start in range(0, count, size):
            yield embeddings[start : min(start + size, count)]  # the library refuses to slice beyond the end


def _chunks_of_parquet(path: Path, size: int) -> Iterator[np.ndarray]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(size, columns=["embeddings"]):
            yield np.array(batch.column(0).flatten()).reshape(len(batch), -1)


def _ids_of_arrays(path: Path) -> list[str] | None:
    ids = _companion(path, "ids")
    return np.load(ids).tolist() if ids.exists() else None


def _ids_of_safetensors(path: Path) -> list[str] | None:
    with safe_open(path, framework="np") as file:
        entries = file.metadata() or {}
    return json.loads(entries["ids"]) if "ids" in entries else None


def _ids_of_parquet(path: Path) -> list[str] | None:
    from pyarrow import parquet

    if "id" not in parquet.read_schema(path).names:
        return None
    ids: list[str] = parquet.read_table(path, columns=["id"])["id"].to_pylist()
    return ids


def read_rows(path: Path) -> list[int]:
    """Return the numbers of the rows of a part."""
    return _FORMATS[path.suffix].rows(path)


def read_ids(path: Path) -> list[str] | None:
    """Return the ids of the rows of a part; None: its input has none."""
    return _FORMATS[path.suffix].ids(path)


def read_chunks(path: Path, size: int) -> Iterator[np.ndarray]:
    """Yield the embeddings of a part as they are stored, at most `size` at a time."""
    return _FORMATS[path.suffix].chunks(path, size)


class _Format(NamedTuple):
    rows: Callable[[Path], list[int]]
    ids: Callable[[Path], list[str] | None]
    chunks: Callable[[Path, int], Iterator[np.ndarray]]


_FORMATS = {
    ".safetensors": _Format(_rows_of_safetensors, _ids_of_safetensors, _chunks_of_safetensors),
    ".parquet": _Format(_rows_of_parquet, _ids_of_parquet, _chunks_of_parquet),
    ".npy": _Format(_rows_of_arrays, _ids_of_arrays, _chunks_of_arrays),
}
