"""Folders that are written in parts: their record says at the end, in one step, that all parts are there."""

from __future__ import annotations

import json
from pathlib import Path

from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.output_folder import RECORD

_ENTRY = "complete"


def mark_complete(folder: Path, rows: int) -> None:
    """Note in the record of a locked folder that its contents are complete; a run that begins removes the note.

    Args:
        folder: The folder.
        rows: Number of rows in its parts.
    """
    path = folder / RECORD
    record = json.loads(path.read_text(encoding="utf-8"))
    write_atomically(path, json.dumps(record | {_ENTRY: {"rows": rows}}, indent=1) + "\n")


def complete_rows(folder: Path) -> int | None:
    """Return the number of rows of a folder that is complete; None: it is not, or has no record that can be read."""
    try:
        return int(json.loads((folder / RECORD).read_text(encoding="utf-8"))[_ENTRY]["rows"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
