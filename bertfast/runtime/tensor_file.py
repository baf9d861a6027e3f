"""Files of tensors, in the safetensors format."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bertfast.runtime.atomic_write import apply_umask, named_in_errors


def write_tensors(tensors: dict[str, Tensor], path: Path, entries: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, or raise OSError if it cannot be written, as when the disk is full.

    Args:
        tensors: Its tensors by name.
        path: The file.
        entries: Further entries of its metadata.
    """
    path.touch()
    mode = path.stat().st_mode  # that of the umask; safetensors writes files that only the owner reads
    with safetensors_errors(path):
        save_file(tensors, path, metadata={"format": "pt", **(entries or {})})
    path.chmod(mode)


@contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Have an error of the library while it writes `path` be that of the operating system that caused it."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path} could not be written, what was saved before is kept: {error}") from error
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


@contextmanager
def replaced_files(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, whose files replace those of the same names in `folder`, which is made if missing.

    Raises:
        OSError: The files cannot be written; what was saved before is kept.
    """
    temporary = folder / ".saving"
    try:
        with named_in_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            with safetensors_errors(folder):
                yield temporary
            apply_umask(temporary)
            for file in temporary.iterdir():
                os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
