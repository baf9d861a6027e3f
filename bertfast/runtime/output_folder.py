"""Output folders: a record of what their contents were made from, and a lock that keeps other runs out.

A command that continues or reuses what a folder contains must not mix it with results of other inputs or settings.
Every such command opens its folder with `output_folder`, which compares the record in the folder with the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bertfast.runtime.atomic_write import remove, write_atomically

RECORD = "origin.json"
LOCK = ".lock"


@dataclass(frozen=True)
class Origin:
    """What the contents of a folder are made from.

    Attributes:
        inputs: Files that are read, by the flag that names them. Where a file lies does not matter, its contents do.
        settings: Settings that the contents depend on, by flag: values that JSON can hold.
    """

    inputs: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class OriginError(ValueError):
    """The contents of a folder have another origin than the run, or no record of one.

    Attributes:
        problem: The folder and the differences, without what to do about them.
    """

    def __init__(self, problem: str):
        super().__init__(f"{problem}: choose another --output-dir, or pass --overwrite-output-dir to replace them")
        self.problem = problem


@contextmanager
def output_folder(
    path: Path, origin: Origin, contents: Sequence[str], *, overwrite: bool = False, lock: str = LOCK
) -> Iterator[Path]:
    """Lock a folder for this process, and compare its record with an origin or write one.

    The operating system releases the lock when the process ends, however it ends: no stale lock can remain.

    Args:
        path: Folder; it is created if it does not exist.
        origin: What this run makes its contents from.
        contents: Patterns of the files and folders that the command writes, such as "part-*".
        overwrite: Remove these files and folders first. Other files stay.
        lock: Name of the lock, for processes that write different parts of the folder at the same time.

    Yields:
        The folder.

    Raises:
        OriginError: The contents have another origin or no record.
        ValueError: Another process writes to the folder.
    """
    with locked_folder(path, lock):
        existing = [found for pattern in contents for found in path.glob(pattern)]
        record = None if overwrite else _read_record(path)
        described = _describe(origin, record)
        if overwrite:
            for found in existing:
                remove(found)
        elif existing:
            _check(path, record, described)
        write_atomically(path / RECORD, json.dumps(described | {"versions": _versions()}, indent=1) + "\n")
        yield path


@contextmanager
def locked_folder(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Create a folder if it does not exist, and lock it for this process.

    Raises:
        ValueError: Another process has locked it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name, timeout=0, thread_local=False)
    owner = folder / f"{name}-owner"
    try:
        lock.acquire()
    except Timeout:
        holder = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
        raise ValueError(f"{folder} is in use by {holder}: wait for its end, or choose another --output-dir") from None
    try:
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.release()


def _read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a folder, or None if there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return record if isinstance(record["inputs"], dict) and isinstance(record["settings"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(origin: Origin, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the record of an origin; a file that is as it was for an earlier record is not hashed again."""
    known = {} if record is None else {file["path"]: file for files in record["inputs"].values() for file in files}
    inputs = {flag: [_describe_file(file, known) for file in files] for flag, files in origin.inputs.items()}
    return {"inputs": inputs, "settings": json.loads(json.dumps(dict(origin.settings)))}


def _describe_file(path: Path, known: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    state, name = path.stat(), str(path.absolute())
    description = {"path": name, "bytes": state.st_size, "modified": state.st_mtime_ns}
    if description.items() <= known.get(name, {}).items():
        return dict(known[name])
    with path.open("rb") as file:
        return description | {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _check(folder: Path, record: Mapping[str, Any] | None, described: Mapping[str, Any]) -> None:
    if record is None:
        raise OriginError(f"{folder} has contents without a record of their inputs and settings")
    differences = []
    for flag in sorted(record["inputs"].keys() | described["inputs"].keys()):
        before, now = record["inputs"].get(flag, []), described["inputs"].get(flag, [])
        if [file["sha256"] for file in before] != [file["sha256"] for file in now]:
            differences.append(f"{flag} was {_files(before)} and is {_files(now)}")
    for flag in sorted(record["settings"].keys() | described["settings"].keys()):
        before, now = record["settings"].get(flag), described["settings"].get(flag)
        if before != now:
            differences.append(f"{flag} was {json.dumps(before)} and is {json.dumps(now)}")
    if differences:
        raise OriginError(f"{folder} was written with other inputs or settings: {'; '.join(differences)}")


def _files(files: Sequence[Mapping[str, Any]]) -> str:
    """Return files for a message: the first two with size and hash, and how many more there are."""
    shown = [f"{file['path']} ({file['bytes']:,} bytes, SHA-256 {file['sha256'][:8]}…)" for file in files[:2]]
    return " and ".join(shown + [f"{len(files) - 2} more"] * (len(files) > 2)) or "absent"


def _versions() -> dict[str, str]:
    return {"bertfast": version("bertfast"), "torch": torch.__version__, "python": platform.python_version()}
