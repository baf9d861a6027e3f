"""Files of tensors, in the safetensors format."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, or raise OSError if it cannot be written, as when the disk is full."""
    path.touch()
    mode = path.stat().st_mode  # that of the umask; safetensors writes files that only the owner reads
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, what was saved before is kept: {error}") from error
    path.chmod(mode)
