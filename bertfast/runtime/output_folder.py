"""Output folders: a record of what their contents were made from, and a lock that keeps other runs out.

A command must not mix its output with that of other inputs or settings. Every command that writes a folder locks it,
compares the record in it with the run, and records what the run is made from before it writes anything else.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

from filelock import FileLock, Timeout

from bertfast.runtime.atomic_write import named_in_errors, remove, write_atomically
from bertfast.runtime.versions import versions

RECORD = "origin.json"
LOCK = ".lock"
UNFINISHED = ".unfinished"
"""Name of the folder in which contents are built before they replace those of the folder around it."""


class FileRecord(TypedDict):
    """What a record says about an input: path, size, modification time in ns, and SHA-256 (empty: a pipe)."""

    path: str
    bytes: int
    modified: int
    sha256: str


class Record(TypedDict):
    """Contents of `origin.json` that are compared: the fields of an `Origin`.

    The file also has the versions of Python and the libraries, for information: an update does not end a run.
    """

    command: str
    inputs: dict[str, list[FileRecord]]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Origin:
    """What the contents of a folder are made from.

    Attributes:
        inputs: Files that are read, by the flag that names them. Where a file lies does not matter, its contents do.
        settings: Settings that the contents depend on, by flag: values that JSON can hold.
        command: Command that writes the folder.
        consequences: What else changes with inputs and settings, as a sentence for messages: by it, their flags.
        may_change: Flags of settings that may differ from those of the run that is continued.
    """

    inputs: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    consequences: Mapping[str, Sequence[str]] = field(default_factory=dict)
    may_change: Sequence[str] = ()


class OriginError(ValueError):
    """The contents of a folder have another origin than the run, or no record of one, or cannot be continued.

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
        ValueError: Another process writes to the folder, it belongs to another command, or an input is one of the files
            to replace.
    """
    with locked_folder(path, lock):
        check_contents(path, origin, contents, overwrite=overwrite)()
        yield path


def check_contents(
    folder: Path, origin: Origin, contents: Sequence[str], *, overwrite: bool = False, continues: bool = True
) -> Callable[[], None]:
    """Compare the record of a locked folder with an origin.

    Args:
        folder: The folder.
        origin: What the run makes its contents from.
        contents: Patterns of the files and folders that the command writes.
        overwrite: Whether these files and folders are to be removed.
        continues: Whether a run continues from contents of the same origin; False: they are refused as well.

    Returns:
        A function to call before the first write: it removes what is to be removed, and records the origin.

    Raises:
        OriginError: The contents have another origin, or no record, or there are some and `continues` is false.
        ValueError: The folder belongs to another command, or an input is one of the files to replace.
    """
    described, existing = _compare(folder, origin, contents, overwrite, continues)
    return partial(_begin, folder, described, existing if overwrite else [])


@contextmanager
def staged_contents(
    folder: Path,
    origin: Origin,
    contents: Sequence[str],
    *,
    keeps: Callable[[BaseException], bool],
    reset: Callable[[Path], None] = remove,
    overwrite: bool = False,
    completes: bool = True,
) -> Iterator[Path]:
    """Context in which the contents of a locked folder are built next to the old ones, which they replace at its end.

    Until then the old contents and their record stay as they are. An interrupted run of the same origin continues.

    Args:
        folder: The folder.
        origin: What the run makes its contents from.
        contents: Patterns of the files and folders that the command writes.
        keeps: Whether what was built until an error is kept, for a run that continues.
        reset: Removes from what another run has built what this run cannot use.
        overwrite: Whether contents of another origin, finished or not, are to be replaced.
        completes: Whether the contents are complete at the end of the context; else they stay unfinished.

    Yields:
        The folder to build in. If it is gone at the end, nothing is replaced.

    Raises:
        OriginError: The contents, or those of an unfinished run, have another origin, or no record.
        ValueError: The folder belongs to another command, or an input is one of the files to replace.
    """
    described, existing = _compare(folder, origin, contents, overwrite, continues=True)
    building = folder / UNFINISHED
    record = read_record(building)
    differ = record is not None and _differences(record, described)
    if differ and not overwrite and not existing:  # else the contents are those of this run already
        _check(folder, [building], record, described, origin, continues=True)
    try:
        if differ:
            reset(building)
        elif record is None:
            remove(building)  # of a run that was killed before it began
        if record is None or differ:
            _begin(building, described, [])
        yield building
        if completes and building.exists():
            _publish(building, folder, contents)
    except BaseException as error:
        if not keeps(error):
            remove(building)
        raise


def _compare(
    folder: Path, origin: Origin, contents: Sequence[str], overwrite: bool, continues: bool
) -> tuple[Record, list[Path]]:
    """Compare a locked folder with an origin, see `check_contents`; return the new record and the contents."""
    record = require_command(folder, origin.command)
    described = _describe(origin, record)
    _require_inputs_elsewhere(folder, origin, contents)
    existing = [path for pattern in contents for path in folder.glob(pattern)]
    if record is None and not existing and not overwrite and (folder / RECORD).exists():
        raise OriginError(f"{folder / RECORD} is damaged")
    if existing and not overwrite:
        _check(folder, existing, record, described, origin, continues)
    return described, existing


def _publish(building: Path, folder: Path, contents: Sequence[str]) -> None:
    """Replace the contents of a folder, and its record, by those that were built.

    First all old contents are moved away: if the process is killed meanwhile, some are missing, but none are mixed.
    """
    old = building / "old"
    with named_in_errors(folder):
        remove(old)
        old.mkdir()
        if read_record(folder) is None:  # a run that is killed from here on continues
            shutil.copyfile(building / RECORD, folder / RECORD)
        for source, target in ((folder, old), (building, folder)):
            for path in [path for pattern in contents for path in source.glob(pattern)]:
                os.replace(path, target / path.name)
        os.replace(building / RECORD, folder / RECORD)
        remove(building)


def require_command(folder: Path, command: str) -> Record | None:
    """Return the record of a folder, as `read_record`; raise ValueError if it names another command.

    Its files are not replaced on request either: those that the new command does not write would stay under its record.
    """
    record = read_record(folder)
    if record is not None and record["command"] != command:
        raise ValueError(
            f"{folder} belongs to `bertfast {record['command']}`: choose another --output-dir, or delete it first"
        )
    return record


def require_origin(folder: Path, origin: Origin) -> None:
    """Compare what an origin names with the record of a finished run, which may name more.

    Raises:
        OriginError: They differ, or there is no record.
        ValueError: The folder belongs to another command.
    """
    record = require_command(folder, origin.command)
    described = _describe(origin, record)
    _check(folder, [folder], record and _restricted(record, described), described, origin, continues=True)


def described(folder: Path, origin: Origin) -> dict[str, Any]:
    """Return what the record of a folder with this origin has: its inputs with hashes, its settings and versions."""
    return {**_describe(origin, read_record(folder)), "versions": versions()}


def differences_from(folder: Path, origin: Origin) -> list[str]:
    """Return how what an origin names differs from the record of a folder, which may name more and may be missing."""
    record = read_record(folder)
    described = _describe(origin, record)
    return [] if record is None else [*_differences(_restricted(record, described), described).values()]


def _restricted(record: Record, described: Record) -> Record:
    """Return what a record says about the inputs and settings that another one names."""
    inputs = {flag: files for flag, files in record["inputs"].items() if flag in described["inputs"]}
    settings = {flag: value for flag, value in record["settings"].items() if flag in described["settings"]}
    return Record(command=record["command"], inputs=inputs, settings=settings)


@contextmanager
def locked_folder(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Create a folder if it does not exist, and lock it for this process.

    At the end, a new folder without contents is removed, with the new folders above it.

    The operating system releases the lock when the process ends, however it ends: no stale lock can remain.

    Raises:
        ValueError: Another process has locked it.
        OSError: The folder cannot be written.
    """
    lock, owner = FileLock(folder / name, timeout=0, thread_local=False), folder / f"{name}-owner"
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with named_in_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            holder = owner.read_text(encoding="utf-8") if owner.is_file() else "another process"
            raise ValueError(
                f"{folder} is in use by {holder}: wait for its end, or choose another --output-dir"
            ) from None
    try:
        with named_in_errors(folder):
            owner.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        owner.unlink(missing_ok=True)
        unused = bool(new) and [path.name for path in folder.iterdir()] in ([], [name])
        if unused:  # as after an error before any work
            (folder / name).unlink(missing_ok=True)
        lock.release()
        if unused:
            with suppress(OSError):  # another process has begun to use one of them
                for path in new:
                    path.rmdir()


def read_record(folder: Path) -> Record | None:
    """Return the record of a folder, or None if there is none that can be read."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        inputs = {
            flag: [FileRecord(**{key: file[key] for key in FileRecord.__annotations__}) for file in files]  # type: ignore[typeddict-item]  # JSON
            for flag, files in record["inputs"].items()
        }
        return Record(command=record["command"], inputs=inputs, settings=dict(record["settings"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _begin(folder: Path, described: Record, old: Sequence[Path]) -> None:
    """Remove old contents, and write the record of the new ones."""
    with named_in_errors(folder):
        for path in old:
            remove(path)
    write_atomically(folder / RECORD, json.dumps(described | {"versions": versions()}, indent=1) + "\n")


def _require_inputs_elsewhere(folder: Path, origin: Origin, contents: Sequence[str]) -> None:
    """Raise ValueError if a file that is read, or the target of a link to one, would be replaced."""
    root = folder.resolve()
    for flag, files in origin.inputs.items():
        for file in files:
            for path in (file.parent.resolve() / file.name, file.resolve()):
                if root in path.parents and any(map(Path(path.relative_to(root).parts[0]).match, contents)):
                    raise ValueError(f"{flag} reads {file}, which would be replaced: choose another --output-dir")


def _describe(origin: Origin, record: Record | None) -> Record:
    """Return the record of an origin; a file that is as it was for an earlier record is not hashed again."""
    known = {} if record is None else {file["path"]: file for files in record["inputs"].values() for file in files}
    inputs = {flag: [_describe_file(file, known) for file in files] for flag, files in origin.inputs.items()}
    return Record(command=origin.command, inputs=inputs, settings=json.loads(json.dumps(dict(origin.settings))))


def _describe_file(path: Path, known: Mapping[str, FileRecord]) -> FileRecord:
    state, name = path.stat(), str(path.absolute())
    earlier = known.get(name)
    if earlier is not None and (earlier["bytes"], earlier["modified"]) == (state.st_size, state.st_mtime_ns):
        return earlier
    digest = ""
    if path.is_file():  # a pipe can be read only once
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileRecord(path=name, bytes=state.st_size, modified=state.st_mtime_ns, sha256=digest)


def _check(
    folder: Path, existing: Sequence[Path], record: Record | None, described: Record, origin: Origin, continues: bool
) -> None:
    """Raise OriginError if existing contents do not have the described origin, or cannot be continued."""
    if record is None:
        raise OriginError(f"{folder} has contents without a record of their inputs and settings ({existing[0].name})")
    differences = {key: text for key, text in _differences(record, described).items() if key not in origin.may_change}
    if differences:
        found = [*differences.values()]
        found += [what for what, flags in origin.consequences.items() if differences.keys() & {*flags}]
        raise OriginError(f"{folder} was written with other inputs or settings: {'; '.join(found)}")
    if not continues:
        raise OriginError(f"{folder} has the results of a run with the same inputs and settings")


def _differences(record: Record, described: Record) -> dict[str, str]:
    """Return what differs by flag, with old and new values."""
    differences = {}
    for flag in sorted(record["inputs"].keys() | described["inputs"].keys()):
        old_files, new_files = record["inputs"].get(flag, []), described["inputs"].get(flag, [])
        old, new = ([file["sha256"] for file in files] for files in (old_files, new_files))
        if old != new or "" in new:
            differences[flag] = f"{flag} was {_changed(old_files, new)} and is {_changed(new_files, old)}"
    for flag in sorted(record["settings"].keys() | described["settings"].keys()):
        before, now = record["settings"].get(flag), described["settings"].get(flag)
        if before != now:
            differences[flag] = f"{flag} was {_shown(before)} and is {_shown(now)}"
    return differences


def _changed(files: Sequence[FileRecord], others: Sequence[str]) -> str:
    """Return the files for a message whose hashes are not among `others`; all, if only their order differs."""
    changed = [file for file in files if not file["sha256"] or file["sha256"] not in others]
    if not changed and len(files) == len(others):
        return _files(files)
    unchanged = len(files) - len(changed)
    return _files(changed) + f", next to {unchanged} unchanged" * (unchanged > 0)


def _files(files: Sequence[FileRecord]) -> str:
    """Return files for a message: the first two with size and hash, and how many more there are."""
    shown = [
        f"{file['path']} ({file['bytes']:,} bytes, SHA-256 {file['sha256'][:8] or 'unknown'}…)" for file in files[:2]
    ]
    return " and ".join(shown + [f"{len(files) - 2} more"] * (len(files) > 2)) or "absent"


def _shown(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
