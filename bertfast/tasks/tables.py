"""Rows of a task: TSV with no quoting, CSV with quoting, or JSONL with an object a line, each also compressed."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Literal

from bertfast.data.corpus import COMPRESSIONS, json_object, read_lines

FORMS = (".tsv", ".csv", ".jsonl")
SUFFIXES = tuple(f"{form}{compression}" for form in FORMS for compression in COMPRESSIONS)

OnBadRows = Literal["stop", "skip"]
_SHOWN = 3  # bad rows that are shown before they are only counted

logger = logging.getLogger("bertfast")


class BadRows:
    """What becomes of rows that cannot be used: an error at the first, or all are left out and counted."""

    def __init__(self, do: OnBadRows = "stop"):
        self.do, self.count = do, 0

    def add(self, what: str) -> None:
        """Take note of a bad row; ValueError where none is to be skipped."""
        if self.do == "stop":
            raise ValueError(what)
        self.count += 1
        if self.count <= _SHOWN:
            logger.warning("left out: %s", what)


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a file, column by column.

    Attributes:
        path: the file.
        columns: {name: its value in each row}; strings, or in JSONL whatever stands there, None where nothing does.
        lines: the line that each row stands on, from 1 on.
    """

    path: Path
    columns: dict[str, list]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.lines)

    def where(self, row: int) -> str:
        """The file and line of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def column(self, name: str) -> list:
        """The values of a column; ValueError, naming those that are there, if it is not."""
        if name not in self.columns:
            near = get_close_matches(name, self.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.path} has no column {name!r}, only {', '.join(map(repr, self.columns))}{hint}")
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """The values of a column of text; ValueError if one is something else, or if there is no text in any."""
        texts = self.column(name)
        for row, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"{self.where(row)}: column {name!r} holds {json.dumps(text)} where a text is wanted")
        if not any(map(str.strip, texts)):
            raise ValueError(f"{self.path} holds no text in its column {name!r}")
        return texts

    def rows(self, kept: Iterable[int]) -> Table:
        """Some of the rows."""
        kept = list(kept)
        columns = {name: [values[row] for row in kept] for name, values in self.columns.items()}
        return Table(self.path, columns, [self.lines[row] for row in kept])


def read_table(path: Path | str, *, header: Sequence[str] | None = None, bad: BadRows | None = None) -> Table:
    """Read a .tsv, .csv or .jsonl file, compressed or not; FileNotFoundError or ValueError where that cannot be done.

    `header` names the columns of a file whose first line is a row already; `bad` is told of rows that are no such.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} is of an unknown kind; known are {', '.join(SUFFIXES)}")
    form = next(form for form in FORMS if form in path.suffixes[-2:])
    bad = bad or BadRows()
    if form == ".jsonl":
        table = _read_jsonl(path, bad)
    else:
        table = _read_fields(path, _tsv_rows(path) if form == ".tsv" else _csv_rows(path), header, bad)
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    return table


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, without their ends, and without the mark that some editors put before the first."""
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
