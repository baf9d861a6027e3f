"""Rows of a task: TSV with a header and no quoting, or JSONL with an object a line, each also compressed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from bertfast.data.corpus import COMPRESSIONS, json_object, read_lines

SUFFIXES = tuple(f"{form}{compression}" for form in (".tsv", ".jsonl") for compression in COMPRESSIONS)


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


def read_table(path: Path | str) -> Table:
    """Read a .tsv or .jsonl file, compressed or not; FileNotFoundError or ValueError where that cannot be done."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path} is of an unknown kind; known are {', '.join(SUFFIXES)}")
    stripped = ((number, line.rstrip("\r\n")) for number, line in read_lines(path))
    lines = ((number, line) for number, line in stripped if line)
    table = (_read_tsv if ".tsv" in path.suffixes[-2:] else _read_jsonl)(path, lines)
    if not len(table):
        raise ValueError(f"{path} holds no rows")
    return table


def _read_tsv(path: Path, lines: Iterator[tuple[int, str]]) -> Table:
    _, first = next(lines, (0, ""))
    header = first.split("\t")
    rows, numbers = [], []
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(fields)} fields where the header has {len(header)}; "
                "a .tsv has no quoting, so no field holds a tab"
            )
        rows.append(fields)
        numbers.append(number)
    return Table(path, {name: [row[i] for row in rows] for i, name in enumerate(header)}, numbers)


def _read_jsonl(path: Path, lines: Iterator[tuple[int, str]]) -> Table:
    rows, numbers = [], []
    for number, line in lines:
        rows.append(json_object(path, number, line, '{"sentence": "…", "label": "…"}'))
        numbers.append(number)
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(path, {name: [row.get(name) for row in rows] for name in names}, numbers)
