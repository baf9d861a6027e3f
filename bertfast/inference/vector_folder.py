"""A folder of vectors that `bertfast embed` has written: its parts, in order, and what its record says about them.

Shapes: N vectors, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from safetensors import SafetensorError

from bertfast.inference.embedding_files import (
    RANGES,
    OutputPrecision,
    dequantize_embeddings,
    read_chunks,
    read_ids,
    read_ranges,
    read_rows,
    require_size,
)
from bertfast.runtime.completion import complete_rows
from bertfast.runtime.output_folder import RECORD, read_record

_REMEDY = "give the --output-dir of bertfast embed"


@dataclass(frozen=True, eq=False)
class VectorFolder:
    """Vectors on disk, numbered from 1 as the rows of their texts.

    Attributes:
        path: The folder.
        parts: Its parts.
        ends: Number of the last vector of each part.
        settings: Settings of `bertfast embed` by flag, as the record has them.
        precision: Precision in which vectors are stored.
        ranges: Ranges of int8 and uint8, fp32 [2, D]; None: other precisions.
        input_file: File of the texts; None: they came from standard input.
    """

    path: Path
    parts: list[Path]
    ends: list[int]
    settings: dict[str, Any]
    precision: OutputPrecision
    ranges: np.ndarray | None
    input_file: Path | None = None

    @classmethod
    def open(cls, path: Path) -> VectorFolder:
        """Open a folder.

        Raises:
            FileNotFoundError: There is no such folder.
            ValueError: It is none of `bertfast embed`, has one vector per token, is not complete, or a part is missing
                or damaged.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder; {_REMEDY}")
        record = read_record(path)
        if record is None:
            raise ValueError(f"{path} has no {RECORD} that can be read: {_REMEDY}")
        if record["command"] != "embed":
            raise ValueError(f"{path} belongs to `bertfast {record['command']}`: {_REMEDY}")
        settings = record["settings"]
        if settings.get("--pooling") == "none":
            raise ValueError(f"{path} has a vector per token (--pooling none): embed the texts with another --pooling")
        texts = record["inputs"].get("--input-file")
        if (count := complete_rows(path)) is None:
            again = "" if texts else ", with all texts again and --overwrite-output-dir"
            raise ValueError(
                f"{path} is not complete: `bertfast embed` was interrupted, or still runs; to complete it, type the "
                f"same `bertfast embed` command once more{again}"
            )
        precision = settings.get("--output-precision", "float32")
        if precision not in get_args(OutputPrecision):
            raise ValueError(f"{path / RECORD} is damaged: --output-precision is {precision!r:.40}; embed again")
        parts = _parts(path, settings.get("--output-format", "safetensors"))
        ranges_file = path / RANGES
        if "--ranges-file" in record["inputs"]:
            ranges_file = Path(record["inputs"]["--ranges-file"][0]["path"])
        ranges = read_ranges(ranges_file) if precision in ("int8", "uint8") else None
        input_file = Path(texts[0]["path"]) if texts else None
        ends = list(_ends(parts))
        if ends[-1] != count:
            raise ValueError(
                f"{path} has {ends[-1]} of {count} vectors: run bertfast embed again, which writes the others"
            )
        return cls(path, parts, ends, settings, precision, ranges, input_file)

    def __len__(self) -> int:
        return self.ends[-1]

    def require_width(self, size: int, source: str) -> None:
        """Raise ValueError, naming the source of queries of `size` elements, if the vectors have another size."""
        width, bits = self._width, self.precision in ("binary", "ubinary")
        if width != (-(-size // 8) if bits else size):
            found = f"from {8 * width - 7} to {8 * width}" if bits else str(width)
            raise ValueError(
                f"{self.path} has vectors of {found} elements, and {source} of {size}: give those of one model"
            )
        if self.ranges is not None:
            require_size(self.ranges, f"the {RANGES} of {self.path}", size)

    @cached_property  # each batch of queries is compared with it
    def _width(self) -> int:
        """Elements of a vector as it is stored."""
        with _damage_named(self.parts[0]):
            width: int = next(read_chunks(self.parts[0], 1)).shape[1]
        return width

    def chunks(self, count: int, size: int) -> Iterator[np.ndarray]:
        """Yield all vectors in order, at most `count` at a time: fp32 [≤ count, size], dequantised."""
        for path in self.parts:
            with _damage_named(path):
                for stored in read_chunks(path, count):
                    yield dequantize_embeddings(stored, self.precision, self.ranges, size)

    def ids(self, rows: Iterable[int]) -> dict[int, str]:
        """Return the ids of the vectors of these numbers; empty if their texts have none."""
        found: dict[int, str] = {}
        by_part: dict[int, list[int]] = {}
        for row in sorted(set(rows)):
            by_part.setdefault(int(np.searchsorted(self.ends, row)), []).append(row)
        for part, of_part in by_part.items():
            first = self.ends[part - 1] + 1 if part else 1
            with _damage_named(self.parts[part]):
                ids = read_ids(self.parts[part])
                found |= {} if ids is None else {row: ids[row - first] for row in of_part}
        return found


def _parts(path: Path, suffix: object) -> list[Path]:
    parts = sorted(path.glob(f"part-[0-9]*.{suffix}"))
    if not parts:
        raise ValueError(f"{path} has no part-00000.{suffix}: embed texts first")
    for number, part in enumerate(parts):
        expected = f"part-{number:05}.{suffix}"
        if part.name != expected:
            raise ValueError(f"{path} has {part.name} but no {expected}: run bertfast embed again, which writes it")
    return parts


def _ends(parts: list[Path]) -> Iterator[int]:
    """Yield the number of the last vector of each part; ValueError if numbers do not go on from part to part."""
    end = 0
    for part in parts:
        with _damage_named(part):
            rows = read_rows(part)
        if not rows or rows != list(range(end + 1, end + len(rows) + 1)):
            raise ValueError(f"{part} does not have the rows from {end + 1} on: run bertfast embed again")
        end += len(rows)
        yield end


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Have errors in reading a part name it."""
    try:
        yield
    except (SafetensorError, OSError, ValueError, EOFError, KeyError, IndexError) as error:
        raise ValueError(f"{path} is damaged ({error}): run bertfast embed again, which computes it again") from None
