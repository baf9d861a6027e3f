"""Where a result comes from: the commit of the code, and the processor."""

from __future__ import annotations

import json
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any


def output_of(*command: str) -> str:
    """Return the standard output of a program, empty if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def changed_files(root: Path) -> list[str]:
    """Return the tracked files of a checkout with uncommitted changes, except results and the log of experiments."""
    sources = (".", ":(exclude)bench/results", ":(exclude)bench/LOG.md")
    lines = output_of("git", "-C", str(root), "status", "--porcelain", "--untracked-files=no", "--", *sources)
    return [line[2:].strip() for line in lines.splitlines()]


def head_of(root: Path) -> str:
    """Return the first 12 digits of the commit of a checkout, empty without a repository."""
    return output_of("git", "-C", str(root), "rev-parse", "--short=12", "HEAD")


@cache
def commit() -> str:
    """Return the commit of a checkout when this is first called, or of an installation from a repository.

    With uncommitted changes, see `changed_files`, it ends with "-dirty"; where it is not known, it is "unknown…".
    """
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        found = head_of(root)
        return found + "-dirty" * bool(changed_files(root)) if found else "unknown"
    try:
        source: dict[str, Any] = json.loads(distribution("bertfast").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        source = {}
    return str(source.get("vcs_info", {}).get("commit_id", "unknown: the installed package does not record it"))


@cache
def processor() -> str:
    """Return the name of the processor, its family and the instruction sets that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in values.get("flags", "").split()]
    return f"{values.get('model name', platform.machine())} (family {values.get('cpu family')}, {' '.join(flags)})"
