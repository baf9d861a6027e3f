"""Rows of the texts that `embed` and `search` read, of which only a part is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bertfast.data.text_files import (
    STANDARD_INPUT,
    is_standard_input,
    read_arriving_lines,
    read_lines,
    read_standard_input,
)
from bertfast.inference.embed_settings import EmbedSettings
from bertfast.tasks.columns import Columns, Text
from bertfast.tasks.tables import SUFFIXES as TABLE_SUFFIXES
from bertfast.tasks.tables import read_chunks


@dataclass(frozen=True)
class TextRow:
    """A text, or pair of texts, its row's number from 1, and the row's id if the file has any."""

    number: int
    text: Text
    id: str | None = None


def source_name(input_file: str | None) -> str:
    """Return the name of an --input-file, or of standard input, for messages."""
    return STANDARD_INPUT if is_standard_input(input_file) else f"--input-file {input_file}"


def no_texts(input_file: str | None) -> ValueError:
    """Return the error of a program whose input has no text."""
    return ValueError(f"{source_name(input_file)} is empty: it needs one text per line or row")


def read_text_rows(settings: EmbedSettings) -> Iterator[TextRow]:
    """Yield the rows of --input-file or standard input.

    Raises:
        ValueError: The file is neither text nor a table, or a row of it cannot be read.
    """
    path = settings.input_file or "-"
    if settings.reads_lines:
        yield from _rows_of_lines(read_standard_input() if is_standard_input(path) else read_lines(Path(path)))
        return
    if not path.endswith(TABLE_SUFFIXES):
        raise ValueError(f"--input-file {path}: give text as .txt, or a table as .tsv, .csv, .jsonl or .json")
    columns = None
    for table in read_chunks(path, settings.texts_per_part):
        columns = columns or Columns.choose(table, settings.text_column, settings.text_pair_column, None)
        columns.require_all_texts(table, text_named=settings.text_column is not None)
        ids = [None] * len(table) if table.rows.ids is None else table.rows.ids
        for number, text, row_id in zip(table.rows.numbers, columns.texts(table), ids, strict=True):
            yield TextRow(number, text, None if row_id is None else str(row_id))


def read_row_groups(settings: EmbedSettings, most: int, least: int) -> Iterator[list[TextRow]]:
    """Yield the rows of `read_text_rows` in groups; those of standard input when they have arrived.

    Args:
        settings: What to read.
        most: Rows of a full group.
        least: Rows of the first group of standard input, or all of them if there are fewer.
    """
    if is_standard_input(settings.input_file):
        yield from ([*_rows_of_lines(lines)] for lines in read_arriving_lines(most, least))
        return
    rows = read_text_rows(settings)
    while group := list(islice(rows, most)):
        yield group


def _rows_of_lines(lines: Iterable[tuple[int, str]]) -> Iterator[TextRow]:
    return (TextRow(number, line.rstrip("\r\n")) for number, line in lines)
