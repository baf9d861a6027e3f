"""Versions of what results depend on."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch


def versions() -> dict[str, str]:
    """Return the versions of bertfast, of the libraries it computes with, and of Python."""
    packages = {name: version(name) for name in ("bertfast", "transformers", "tokenizers")}
    return packages | {"torch": torch.__version__, "python": platform.python_version()}
