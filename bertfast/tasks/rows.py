"""Rows of a data file: their numbers, and those that cannot be used, so that outputs stay aligned with inputs."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, TypeVar

from bertfast.data.text_files import STANDARD_INPUT

OnBadRows = Literal["stop", "skip"]
_MAX_WARNINGS = 3  # further bad rows are only counted

Value = TypeVar("Value")

logger = logging.getLogger("bertfast")


@dataclass(frozen=True)
class Skipped:
    """A row without an example.

    Attributes:
        problem: Why it has none, with file and line.
        id: Its id; None: unknown.
    """

    problem: str
    id: Any = None


class _Position(TypedDict):
    file: str
    row: int
    row_id: Any


class BadRows:
    """Rows that cannot be used: raise at the first, or skip, count and remember them.

    Attributes:
        action: "stop" or "skip".
        remedy: What is appended to the message of the error.
        count: Number of bad rows skipped.
        skipped: By file, the rows without an example by row number.
    """

    def __init__(self, action: OnBadRows = "stop", remedy: str = ""):
        self.action, self.remedy, self.count = action, remedy, 0
        self.skipped: dict[str, dict[int, Skipped]] = {}
        self._warnings: list[tuple[str, int, str]] = []  # (file, row, problem) of bad rows that were not logged yet
        self._logged = 0

    def add(self, problem: str, *, file: str, row: int, row_id: Any = None) -> None:
        """Skip and count a bad row, and remember it for `log_skipped`; ValueError if the action is "stop".

        Args:
            problem: What is wrong, with file and line.
            file: The file.
            row: Number of the row, from 1.
            row_id: Id of the row, if it has one.
        """
        if self.action == "stop":
            raise ValueError(problem + self.remedy)
        if row not in self.skipped.get(file, {}):  # the same file may be that of two splits
            self.count += 1
            self._warnings.append((file, row, problem))
        self.leave_out(problem, file=file, row=row, row_id=row_id)

    def leave_out(self, problem: str, *, file: str, row: int, row_id: Any = None) -> None:
        """Remember that a row has no example, though nothing is wrong with it; see `add`."""
        self.skipped.setdefault(file, {})[row] = Skipped(problem, row_id)

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Context at whose end, also after an error, the first bad rows are logged; see `log_skipped`."""
        try:
            yield
        finally:
            self.log_skipped()

    def log_skipped(self) -> None:
        """Log the first bad rows since the last call in the order of their file: checks find them in another order."""
        files = [*dict.fromkeys(file for file, *_ in self._warnings)]
        self._warnings.sort(key=lambda warning: (files.index(warning[0]), warning[1]))
        for *_, problem in self._warnings[: _MAX_WARNINGS - self._logged]:
            logger.warning("skipped: %s", problem)
            self._logged += 1
        self._warnings.clear()


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a file that examples come from: all, without the skipped ones.

    Attributes:
        file: The file, or `STANDARD_INPUT`.
        numbers: Number of each row, from 1; the header and empty lines are not counted.
        lines: Line number of each row, from 1; None: the rows are found by their ids.
        ids: Id of each row; None: the file has no ids.
        bad: Collects the rows of the file that cannot be used.
    """

    file: str
    numbers: Sequence[int]
    lines: Sequence[int] | None
    ids: Sequence[Any] | None = None
    bad: BadRows = field(default_factory=BadRows)

    @classmethod
    def of_input(cls, count: int, first_row: int, bad: BadRows) -> Rows:
        """Return the rows of `count` lines of standard input, of which the first has the number `first_row`."""
        numbers = range(first_row, first_row + count)
        return cls(STANDARD_INPUT, numbers, numbers, None, bad)

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, index: int) -> str:
        """Return the file and line of the row at `index`, for messages."""
        if self.lines is not None:
            return f"{self.file}, line {self.lines[index]}"
        row_id = None if self.ids is None else self.ids[index]
        return f"{self.file}, row {self.numbers[index]}" + ("" if row_id in (None, "") else f" (id {row_id!r})")

    def reject(self, index: int, problem: str) -> None:
        """Add the row at `index` to the bad rows."""
        self.bad.add(f"{self.where(index)}: {problem}", **self._position(index))

    def leave_out(self, index: int, problem: str) -> None:
        """Say why the row at `index` has no example, though nothing is wrong with it."""
        self.bad.leave_out(f"{self.where(index)}: {problem}", **self._position(index))

    def _position(self, index: int) -> _Position:
        return {"file": self.file, "row": self.numbers[index], "row_id": None if self.ids is None else self.ids[index]}

    def select(self, indices: Iterable[int]) -> Rows:
        """Return the rows at `indices`."""
        chosen = list(indices)
        lines, ids = (None if x is None else [x[i] for i in chosen] for x in (self.lines, self.ids))
        return Rows(self.file, [self.numbers[i] for i in chosen], lines, ids, self.bad)

    def aligned(self, values: Iterable[Value]) -> Iterator[tuple[int, Any, Value | Skipped]]:
        """Yield (row number, id or None, value) of every row in order, with `Skipped` for rows without an example.

        Args:
            values: A value for each of these rows.
        """
        # Values are taken first: computing them may skip rows.
        merged: dict[int, tuple[Any, Value | Skipped]] = dict(
            zip(self.numbers, zip(self.ids or [None] * len(self), values, strict=True), strict=True)
        )
        merged |= {row: (skipped.id, skipped) for row, skipped in self.bad.skipped.get(self.file, {}).items()}
        for row in sorted(merged):
            yield row, *merged[row]
