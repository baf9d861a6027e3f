"""Rows as they stand in the formats of tables, before they are checked: TSV, CSV, JSONL and lists in JSON."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bertfast.data.text_files import (
    decode_json,
    json_object,
    read_json_list,
    read_lines,
    require_rereadable,
    unpaired_surrogate,
)

_OBJECT, _LIST = '{"sentence": "…", "label": "…"}', '["…", "…"]'  # valid lines, shown in messages
_LONGEST_FIELD = 2**31 - 1  # characters of a CSV field; the csv module's own limit is 131,072


@dataclass(slots=True)
class Record:
    """A row as it stands in a file.

    Attributes:
        line: Its first line, from 1; None: it is a value of a list, of which many may be on one line.
        values: Fields, or values by name.
        problem: Why it cannot be read, with file and line.
        parts: If the row has several lines, the fields of each line when its quotes are ignored.
    """

    line: int | None
    values: list[str] | dict[str, Any]
    problem: str | None = None
    parts: Sequence[list[str]] = ()


def tsv_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a .tsv file, empty ones included (without fields).

    In a file of line feeds a carriage return may be part of a text. It ends a row if each part of the line has as many
    tabs as the others.
    """
    number = 0
    for _, line in read_lines(path):
        parts = line.rstrip("\r\n").split("\r")
        if len({part.count("\t") for part in parts}) > 1 or "\t" not in line:
            parts = ["\r".join(parts)]
        for part in parts:
            number += 1
            yield Record(number, part.split("\t") if part else [])


def json_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a file of one JSON object per line, or, if its name says .json, of one list of objects.

    A line may also be a list of texts, as in training data of sentence-transformers: an anchor, a positive and perhaps
    negatives.
    """
    require_rereadable(path)
    is_list = ".jsonl" not in path.suffixes[-2:] and next(_lines_with_text(path), (0, ""))[1].lstrip().startswith("[")
    for number, text in read_json_list(path) if is_list else _lines_with_text(path):
        where, line = (f"{path}, row {number}", None) if is_list else (f"{path}, line {number}", number)
        try:
            group = None if is_list else _group(where, text)
            yield Record(line, group or json_object(where, text, _OBJECT))
        except ValueError as error:
            yield Record(line, {}, str(error))


def _group(where: str, text: str) -> dict[str, Any] | None:
    """Return the texts of a line that holds a list of them, by name; None: it holds no list.

    Args:
        where: File and line, for messages.
        text: The line.

    Raises:
        ValueError: It is a list of something else.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        texts = decode_json(text)
    except (ValueError, RecursionError):
        return None
    if len(texts) < 2 or not all(isinstance(x, str) for x in texts):
        raise ValueError(f"{where}: neither a list of two or more texts, like {_LIST}, nor an object like {_OBJECT}")
    if (problem := next(filter(None, map(unpaired_surrogate, texts)), None)) is not None:
        raise ValueError(f"{where}: {problem}")
    names = ["anchor", "positive", *(f"negative_{number}" for number in range(1, len(texts) - 1))]
    return dict(zip(names, texts, strict=True))


def _lines_with_text(path: Path) -> Iterator[tuple[int, str]]:
    lines = ((number, line.rstrip("\r\n")) for number, line in read_lines(path, universal=True))
    return ((number, line) for number, line in lines if line.strip())


def csv_records(path: Path) -> Iterator[Record]:
    """Yield the rows of a .csv file, empty ones included (without fields).

    Raises:
        ValueError: A quote that spans several lines is not closed as it should be, which leaves the rows unknown.
    """
    lines: list[str] = []  # of the current row

    def remembered() -> Iterator[str]:
        for _, line in read_lines(path, universal=True):
            lines.append(line)
            yield line

    csv.field_size_limit(_LONGEST_FIELD)
    reader, line = csv.reader(remembered(), strict=True), 1
    while True:
        where = f"{path}, line {line}"
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if len(lines) > 1:
                raise ValueError(
                    f"{where}: the quote that opens here is not closed properly until line {reader.line_num}"
                ) from None
            if "end of data" in str(error):
                raise ValueError(f"{where}: the quote that opens here is never closed") from None
            yield Record(line, [], f"{where}: {error}; write a quote within a quoted field twice")
        else:
            parts = [part.rstrip("\r\n").split(",") for part in lines] if len(lines) > 1 else ()
            yield Record(line, values, parts=parts)
        line = reader.line_num + 1
        lines.clear()
