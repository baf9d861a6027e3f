"""Tables of labelled data, optionally compressed: TSV (no quoting), CSV (quoted), JSONL (one object per line) or JSON.

A .json file holds one list of objects, or one object per line.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import chain, islice
from pathlib import Path
from typing import Any

from bertfast.data.text_files import COMPRESSIONS
from bertfast.runtime.settings import counted
from bertfast.tasks.glue import columns_without_header
from bertfast.tasks.records import Record, csv_records, json_records, tsv_records
from bertfast.tasks.rows import BadRows, Rows

FORMATS = (".tsv", ".csv", ".jsonl", ".json")
SUFFIXES = tuple(f"{format_}{compression}" for format_ in FORMATS for compression in COMPRESSIONS)
SEPARATORS = {".tsv": "\t", ".csv": ","}
ID_COLUMNS = ("id", "index", "idx", "guid")
BLANK = "holds a blank text"
"""What is wrong with a field without a text, for messages."""
_OTHER_SEPARATORS = {
    "\t": "tabs; give it the suffix .tsv",
    ",": "commas; give it the suffix .csv",
    ";": "semicolons; replace them by tabs and give it the suffix .tsv",
}

logger = logging.getLogger("bertfast")


@dataclass(frozen=True, eq=False)
class Table:
    """The rows of a file, or of a part of it, column by column.

    Attributes:
        columns: Values of each row by column name: strings, or JSON values (None if missing) in JSON.
        rows: Where each row comes from.
    """

    columns: dict[str, list[Any]]
    rows: Rows

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def path(self) -> str:
        """The file."""
        return self.rows.file

    @property
    def found(self) -> str:
        """The names of the columns, for messages."""
        return f"only {', '.join(map(repr, self.columns))}" if self.columns else "as its objects are empty"

    def column(self, name: str) -> list[Any]:
        """Return the values of a column; ValueError, naming the columns of the file, if there is none of that name."""
        if name not in self.columns:
            near = get_close_matches(name, self.columns, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{self.path} has no column {name!r}, {self.found}{hint}")
        return self.columns[name]

    def texts(self, name: str) -> list[str]:
        """Return the texts of a column without bad rows; ValueError if all are blank."""
        texts = self.with_texts(name).column(name)
        if not any(map(str.strip, texts)):
            raise ValueError(f"{self.path} holds no text in its column {name!r}")
        return texts

    def with_texts(self, *names: str, blank: bool = True) -> Table:
        """Return the rows in which these columns hold texts; the others are bad rows.

        Args:
            names: Names of the columns.
            blank: Whether a text may be blank.
        """
        usable = []
        for row, values in enumerate(zip(*map(self.column, names), strict=True)):
            wrong = next((i for i, x in enumerate(values) if not isinstance(x, str) or not (blank or x.strip())), None)
            if wrong is None:
                usable.append(row)
            else:
                value = values[wrong]
                self.rows.reject(row, f"column {names[wrong]!r} {BLANK if isinstance(value, str) else not_text(value)}")
        return self if len(usable) == len(self) else self.select(usable)

    def require_different(self, first: str, second: str | None) -> None:
        """Raise ValueError if the columns of the two texts of a pair are the same one."""
        if first == second:
            raise ValueError(
                f"{self.path}: the column {first!r} would be both texts of a pair: name another one with --text-column "
                "or --text-pair-column"
            )

    def select(self, indices: Iterable[int]) -> Table:
        """Return a table of the rows at `indices`."""
        indices = list(indices)
        columns = {name: [values[row] for row in indices] for name, values in self.columns.items()}
        return Table(columns, self.rows.select(indices))


def read_table(path: Path | str, *, bad: BadRows | None = None) -> Table:
    """Read a .tsv, .csv, .jsonl or .json file, optionally compressed; see `read_chunks`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is unknown, the file has no usable rows, or a row is malformed.
    """
    table = next(read_chunks(path, None, bad=bad))
    if not len(table):
        raise ValueError(f"{path} holds no usable rows")
    return table


def read_chunks(path: Path | str, size: int | None, *, bad: BadRows | None = None) -> Iterator[Table]:
    """Yield the tables of `size` rows that make up a .tsv, .csv, .jsonl or .json file, optionally compressed.

    Args:
        path: The file.
        size: Rows per table, bad ones included; None: all rows in one table.
        bad: Collects malformed rows; None: raise at the first.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The suffix is unknown, the file has no rows, its columns are ambiguous, quotes make rows ambiguous,
            or a row is malformed.
    """
    path = Path(path)
    if not path.exists() or path.is_dir():
        raise FileNotFoundError(f"there is no file {path}")
    if not path.name.endswith(SUFFIXES):
        raise ValueError(
            f"{path} has an unknown file type; use one of {', '.join(FORMATS)}, optionally compressed "
            f"({', '.join(filter(None, COMPRESSIONS))})"
        )
    suffix = next(suffix for suffix in FORMATS if suffix in path.suffixes[-2:])
    bad = bad or BadRows()
    if suffix not in SEPARATORS:
        names: list[str] = []
        records = json_records(path)
    else:
        records = tsv_records(path) if suffix == ".tsv" else csv_records(path)
        names, records = _header(path, SEPARATORS[suffix], records)
    reader = _TableReader(path, names, bad)
    first = next(records, None)
    if first is None:
        raise ValueError(f"{path} holds no rows")
    records = chain([first], records)
    while chunk := list(islice(records, size)):
        yield reader.table(chunk)


class _TableReader:
    """Makes tables of records.

    Args:
        path: The file.
        names: Names of the columns; those of JSON objects are added as they appear.
        bad: Collects malformed rows.
    """

    def __init__(self, path: Path, names: list[str], bad: BadRows):
        self.path, self.names, self.bad = path, names, bad
        self.number = 0  # of the last row
        self.ids: set[int] = set()  # hashes, which bound memory
        self.previous: list[Record] = []  # those of the last table, with which a short one is compared
        self.warned = False  # of a row on several lines

    def table(self, records: list[Record]) -> Table:
        """Return the table of the next records without those that cannot be used."""
        numbers, lines, rows = [], list[int](), []
        for record in records:
            self.number += 1
            problem = record.problem or self._problem(record)
            if problem is not None:
                self.bad.add(problem, file=str(self.path), row=self.number)
                continue
            numbers.append(self.number)
            lines += [] if record.line is None else [record.line]
            rows.append(record.values)
        self._require_plausible_quotes(records)
        return self._without_repeated_ids(
            Table(self._columns(rows), Rows(str(self.path), numbers, lines or None, None, self.bad))
        )

    def _columns(self, rows: list[list[str] | dict[str, Any]]) -> dict[str, list[Any]]:
        objects = [row for row in rows if isinstance(row, dict)]
        self.names += dict.fromkeys(name for row in objects for name in row if name not in self.names)
        if objects:
            return {name: [row.get(name) for row in objects] for name in self.names}
        return {name: [row[i] for row in rows if isinstance(row, list)] for i, name in enumerate(self.names)}

    def _problem(self, record: Record) -> str | None:
        if isinstance(record.values, dict):
            return None
        if len(record.values) == len(self.names):
            repeated = record.values == self.names and len(self.names) > 1
            return f"{self.path}, line {record.line}: repeats the header; remove the line" if repeated else None
        is_csv = ".csv" in self.path.suffixes[-2:]
        hint = (
            "a field that holds a comma must be quoted" if is_csv else "a .tsv has no quoting, so no field holds a tab"
        )
        hint = f"; {hint}" if len(record.values) > len(self.names) else ""
        fields = counted(len(record.values), "field")
        return f"{self.path}, line {record.line}: {fields} where the header has {len(self.names)}{hint}"

    def _without_repeated_ids(self, table: Table) -> Table:
        """Return a table whose rows have ids, if there is a column of ids; rows that repeat an id are bad rows."""
        name = next((name for name in ID_COLUMNS if name in table.columns), None)
        if name is None:
            return table
        usable, rows = [], Rows(table.path, table.rows.numbers, table.rows.lines, table.columns[name], self.bad)
        for row, value in enumerate(table.columns[name]):
            if value not in (None, ""):
                key = hash(str(value))
                if key in self.ids:
                    rows.reject(row, f"the {name} {value!r} is repeated: remove the row, or rename the column {name!r}")
                    continue
                self.ids.add(key)
            usable.append(row)
        return Table(table.columns, rows).select(usable)

    def _require_plausible_quotes(self, records: list[Record]) -> None:
        """Check the rows on several lines of which each looks like a row of its own, with as many fields as columns.

        Warn, once per file, as a stray quote may have swallowed the lines.

        Raises:
            ValueError: In one column, all those lines have values as rows on one line have them, such as labels, or
                numbers where those rows have nothing else.
        """
        suspicious = [
            record
            for record in records
            if record.parts and all(len(fields) == len(self.names) for fields in record.parts)
        ]
        compared = [*self.previous, *records]
        self.previous = records
        if not suspicious:
            return
        lists = (record.values for record in compared if not record.parts and isinstance(record.values, list))
        columns = [*map(set, zip(*(values for values in lists if len(values) == len(self.names)), strict=True))]
        for record in suspicious:
            lines = f"{self.path}, line {record.line}: the quote that opens here"
            remedy = 'write a quote within a text twice and quote the text: "a ""word"""'
            for usual, values in zip(columns, zip(*record.parts, strict=True), strict=False):
                if usual.issuperset(values) or all(map(_is_number, chain(usual, values))):
                    raise ValueError(f"{lines} swallows {len(record.parts) - 1} further rows; {remedy}")
            if not self.warned:
                logger.warning("%s goes on for %d lines; if these are rows, %s", lines, len(record.parts), remedy)
                self.warned = True


def not_text(value: Any) -> str:
    """Return what a field holds instead of a text, for messages; JSON objects may also lack it."""
    return "is null or missing" if value is None else f"holds {json.dumps(value, ensure_ascii=False)}, not a text"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _header(path: Path, separator: str, records: Iterator[Record]) -> tuple[list[str], Iterator[Record]]:
    """Return the names of the columns, and the rows below them.

    Raises:
        ValueError: The file is separated otherwise than its suffix says, or names are missing or repeated.
    """
    first = next((record for record in records if record.values or record.problem), None)
    if first is None:
        raise ValueError(f"{path} holds no rows")
    names = [*first.values]
    where = f"{path}, line {first.line}"
    if first.problem is not None:
        raise ValueError(first.problem)
    if (columns := columns_without_header(names)) is not None:
        return [*columns], (record for record in chain([first], records) if record.values or record.problem)
    _require_separator(separator, names, where)
    repeated = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if repeated is not None:
        raise ValueError(f"{where}: two columns are called {repeated!r}; rename one of them")
    # An unnamed first column is the row index that pandas writes, as in SWAG's files.
    unnamed = next((i for i, name in enumerate(names[1:], 2) if not name.strip()), None)
    if unnamed is not None:
        raise ValueError(f"{where}: column {unnamed} of {len(names)} has no name; give it one")
    if len(names) > 1:
        return names, (record for record in records if record.values or record.problem)
    # In a file of one column an empty line is a row.
    return names, (Record(record.line, record.values or [""], record.problem, record.parts) for record in records)


def _require_separator(separator: str, names: list[str], where: str) -> None:
    """Raise ValueError if a header is separated otherwise than the file's suffix says."""
    if len(names) > 1:
        return
    [name] = names
    if name.lstrip().startswith(("{", "[")):
        raise ValueError(f"{where}: holds JSON; give a file of one JSON object per line the suffix .jsonl")
    for other, remedy in _OTHER_SEPARATORS.items():
        if other != separator and other in name:
            raise ValueError(f"{where}: the columns {name!r} are separated by {remedy}")
