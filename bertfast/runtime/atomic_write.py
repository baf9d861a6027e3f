"""Files that appear whole or not at all: written under a temporary name and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; what was written there replaces `path` at the end.

    After an error, the temporary file or folder is removed and `path` is as it was.

    Args:
        path: File or folder to write. Its parent folders are created.

    Yields:
        A path that does not exist, with the suffix of `path`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    remove(temporary)  # of a process that was killed
    try:
        yield temporary
        if path.is_dir() and temporary.is_dir():
            remove(path)  # a folder cannot be renamed over one that has files
        os.replace(temporary, path)
    finally:
        remove(temporary)


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader never sees a part of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
