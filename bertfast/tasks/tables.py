"""Tables of labelled data: TSV (no quoting), CSV (quoted) or JSONL (one object per line), optionally compressed."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from bertfast.data.text_files import COMPRESSIONS, json_object, read_lines

FORMATS = (".tsv", ".csv", ".jsonl")
SUFFIXES = tuple(f"{format_}{compression}" for format_ in FORMATS for compression in COMPRESSIONS)

OnBadRows = Literal["stop", "skip"]
_MAX_WARNINGS = 3  # further bad rows are only counted

logger = logging.getLogger("bertfast")


class BadRows:
    """Rows that cannot be used: raise at the first, or skip and count them.

    Attributes:
        action: "stop" or "skip".
        count: Number of rows skipped.
    """

    def __init__(self, action: OnBadRows = "stop"):
        self.action, self.count = action, 0

    def add(self, problem: str) -> None:
        """Count a bad row and warn about it; ValueError if the action is "stop"."""
        if self.action == "stop":
            raise ValueError(problem)
        self.count += 1
        if self.count <= _MAX_WARNINGS:
            logger.warning("skipped: %s", problem)


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a file, column by column.

    Attributes:
        path: The file.
        columns: Values of each row by column name: strings, or JSON values (None if missing) in JSONL.
        lines: Line number of each row, from 1.
    """

    path: Path
    columns: dict[str, list[Any]]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """Return the file and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def column(self, name: str) -> list[Any]:
        """Return the values of a column; ValueError, naming the columns of the file, if there is none of that name."""
        if name not in self.columns:
            near = get_close_matches(name, self.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.path} has no column {name!r}, only {', '.join(map(repr, self.columns))}{hint}")
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """Return the values of a text column; ValueError if one is not a string, or if all are blank."""
        texts = self.column(name)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{self.where(row)}: column {name!r} holds {json.dumps(text)}, not a text")
        if not any(map(str.strip, texts)):
            raise ValueError(f"{self.path} holds no text in its column {name!r}")
        return texts

    def rows(self, indices: Iterable[int]) -> Table:
        """Return a table of the rows at `indices`."""
        indices = list(indices)
        columns = {name: [values[row] for row in indices] for name, values in self.columns.items()}
        return Table(self.path, columns, [self.lines[row] for row in indices])


def read_table(path: Path | str, *, header: Sequence[str] | None = None, bad: BadRows | None = None) -> Table:
    """Read a .tsv, .csv or .jsonl file, optionally compressed.

    Args:
        path: The file.
        header: Column names of a file without a header line.
        bad: Collects malformed rows; None: raise at the first.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is unknown, the file has no rows, or a row is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} has an unknown file type; use one of {', '.join(SUFFIXES)}")
    suffix = next(suffix for suffix in FORMATS if suffix in path.suffixes[-2:])
    bad = bad or BadRows()
    if suffix == ".jsonl":
        table = _read_jsonl(path, bad)
    else:
        table = _read_fields(path, _tsv_rows(path) if suffix == ".tsv" else _csv_rows(path), header, bad)
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    return table


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield numbered non-empty lines without line ends and byte-order mark."""
    stripped = ((number, line.rstrip("\r\n").removeprefix("\ufeff")) for number, line in read_lines(path))
    return ((number, line) for number, line in stripped if line)


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    return ((number, line.split("\t")) for number, line in _lines(path))


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(line.removeprefix("\ufeff") for _, line in read_lines(path))
    return ((reader.line_num, row) for row in reader if row)


def _read_fields(
    path: Path, lines: Iterator[tuple[int, list[str]]], header: Sequence[str] | None, bad: BadRows
) -> Table:
    names = list(header) if header else next(lines, (0, [""]))[1]
    rows, numbers = [], []
    for number, fields in lines:
        if len(fields) != len(names):
            bad.add(
                f"{path}, line {number}: {len(fields)} fields where the header has {len(names)}"
                + ("; a .tsv has no quoting, so no field holds a tab" if ".tsv" in path.suffixes[-2:] else "")
            )
            continue
        rows.append(fields)
        numbers.append(number)
    return Table(path, {name: [row[i] for row in rows] for i, name in enumerate(names)}, numbers)


def _read_jsonl(path: Path, bad: BadRows) -> Table:
    rows, numbers = [], []
    for number, line in _lines(path):
        try:
            rows.append(json_object(path, number, line, '{"sentence": "…", "label": "…"}'))
        except ValueError as error:
            bad.add(str(error))
            continue
        numbers.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, numbers)
