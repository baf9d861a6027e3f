"""Columns of a table that hold the texts and the labels of sequence classification."""

from __future__ import annotations

from dataclasses import dataclass

from bertfast.tasks.tables import Table

TEXT_COLUMNS = ("sentence", "sentence1", "text")
TEXT_PAIR_COLUMN = "sentence2"
LABEL_COLUMN = "label"

Text = str | tuple[str, str]
"""A text or a pair of texts."""


@dataclass(frozen=True)
class Columns:
    """Names of the columns of a table."""

    text: str
    text_pair: str | None
    label: str

    @classmethod
    def choose(cls, table: Table, text: str | None, text_pair: str | None, label: str | None) -> Columns:
        """Return the named columns; for those that are None, the default names if the table has them.

        Raises:
            ValueError: `text` is None and the table has none of `TEXT_COLUMNS`.
        """
        if text is None:
            text = next((name for name in TEXT_COLUMNS if name in table.columns), None)
        if text is None:
            raise ValueError(
                f"{table.path} has none of the columns {', '.join(TEXT_COLUMNS)}, {table.found}: name the text column "
                "with --text-column, or another task with --task"
            )
        if text_pair is None and TEXT_PAIR_COLUMN in table.columns:
            text_pair = TEXT_PAIR_COLUMN
        table.require_different(text, text_pair)
        return cls(text, text_pair, label or LABEL_COLUMN)

    def require_all_texts(self, table: Table, *, text_named: bool) -> None:
        """Raise ValueError if a later part of a file has a text column that its first part, for which these are, lacks.

        Args:
            table: A part of the file.
            text_named: Whether the text column was named, so that another one is not to replace it.
        """
        later = Columns.choose(table, self.text if text_named else None, self.text_pair, self.label)
        new = next((name for name in (later.text, later.text_pair) if name not in (self.text, self.text_pair)), None)
        if new is not None and len(table):
            row = next((row for row, value in enumerate(table.column(new)) if value is not None), 0)
            raise ValueError(
                f"{table.rows.where(row)}: the text column {new!r}, which the first rows lack, begins here: give all "
                "rows the same columns, or rename this one"
            )

    def with_texts(self, table: Table) -> Table:
        """Return the rows that have all texts; the others are bad rows."""
        return table.with_texts(*filter(None, (self.text, self.text_pair)))

    def texts(self, table: Table) -> list[Text]:
        """Return the texts of the table's rows, or the pairs of texts if there is a second text column."""
        table = self.with_texts(table)
        texts: list[str] = table.column(self.text)
        return [*texts] if self.text_pair is None else [*zip(texts, table.column(self.text_pair), strict=True)]
