"""Files that appear whole or not at all: written under a temporary name and renamed."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bertfast.runtime.display import SHOW_ERRORS

_REMEDIES = {  # of errors that writing alone causes
    errno.ENOSPC: "free space on the disk, or write to another one",
    errno.EDQUOT: "remove other files, or write to another disk",
    errno.EFBIG: "the shell (`ulimit -f`) or the file system limits the size of files; raise the limit, or write to "
    "another disk",
    errno.EROFS: "write to another folder",
}


class CannotWriteError(OSError):
    """A file or folder cannot be written; the message names it, and says why."""


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; what was written there replaces `path` at the end.

    After an error, the temporary file or folder is removed and `path` is as it was.

    Args:
        path: File or folder to write. Its parent folders are created.

    Yields:
        A path that does not exist, with the suffix of `path`.

    Raises:
        CannotWriteError: The path cannot be written, as when the disk is full; see `named_in_errors`.
    """
    temporary = path.with_name(f".{path.name}")
    with named_in_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(temporary)  # of a process that was killed
        try:
            yield temporary
            if path.is_dir() and temporary.is_dir():
                remove(path)  # a folder cannot be renamed over one that has files
            os.replace(temporary, path)
        finally:
            remove(temporary)


@contextmanager
def named_in_errors(path: Path) -> Iterator[None]:
    """Have an error of the operating system say that `path` cannot be written, and why.

    Errors of a full disk name no file, and those of a temporary file name one that the user does not know. Errors of
    files elsewhere, which were to be read, are left as they are.
    """
    try:
        yield
    except OSError as error:
        target, named = path.absolute(), Path(error.filename or path).absolute()
        if error.errno is None or not (target.parent in named.parents or named in target.parents):
            raise
        raise CannotWriteError(f"{path} cannot be written: {reason(error.errno)}") from error


def reason(number: int, meaning: str | None = None) -> str:
    """Return what an error of the operating system means and, if it is one of writing, what to do.

    Args:
        number: Its number.
        meaning: What it means; None: the system's words.
    """
    return ": ".join([meaning or os.strerror(number), *filter(None, [_REMEDIES.get(number)])])


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that a reader never sees a part of it."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors=SHOW_ERRORS)


def reserve(path: Path) -> None:
    """Reserve the disk space of a file that is written through a memory map: a full disk would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def apply_umask(folder: Path) -> None:
    """Give the files in a folder the permissions of the umask: some libraries write files that only the owner reads."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for path in folder.iterdir():
        if path.is_file():
            path.chmod(mode)


def link_or_copy(source: Path, target: Path) -> None:
    """Write a copy of a file, which takes no disk space if the file system has links.

    Neither of the two may be changed in place afterwards; replacing one leaves the other as it is.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:  # the file system has none, or this user may not make them
        shutil.copyfile(source, target)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its contents, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
