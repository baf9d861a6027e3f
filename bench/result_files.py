"""Result files of the benchmarks, with their origin, and the check for uncommitted changes.

A program that writes results calls `require_clean_tree` before it measures, so that each file in bench/results/ belongs
to a commit. By default it writes to the folder of this processor, `machine_folder`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from datetime import date
from itertools import chain, count
from pathlib import Path
from typing import Any

import torch

from bench.harness import DEVICE, ON_GPU
from bertfast.cli.doctor import driver_version, package_version
from bertfast.ops import cuda_build, native
from bertfast.runtime.machine import changed_files, head_of, output_of, processor

ROOT = Path(__file__).resolve().parents[1]  # `bench` may be a link, see `gpu_check`
RESULTS = ROOT / "bench" / "results"
PACKAGES = ["torch", "triton", "transformers", "numpy", "tokenizers", "liger-kernel", "cut-cross-entropy"]
PACKAGES += ["onnxruntime", "openvino", "nncf", "sentence-transformers", "optimum", "accelerate", "datasets"]


def commit_of(root: Path, has_changes: bool) -> str:
    """Return the commit of a checkout, with "+changes" if it has uncommitted ones; else that of BERTFAST_COMMIT."""
    found = head_of(root)
    return found + "+changes" * has_changes if found else os.environ.get("BERTFAST_COMMIT", "")


def require_clean_tree(target: Path) -> None:
    """End the program if it would write into bench/results/ although it is not known which commit was measured.

    Args:
        target: File or folder to which results are to be written.

    Raises:
        SystemExit: There is no commit, or tracked files have uncommitted changes. The message says what to do.
    """
    if not target.resolve().is_relative_to(RESULTS):
        return
    if not _COMMIT:
        raise SystemExit(
            "no results are written to bench/results/ without a repository: set BERTFAST_COMMIT to the commit of these "
            "files, or name another folder with --results"
        )
    if _CHANGED:
        files = ", ".join(_CHANGED[:3]) + ", …" * (len(_CHANGED) > 3)
        raise SystemExit(
            f"no results are written to bench/results/ with uncommitted changes ({files}): commit them, or name "
            "another folder with --results"
        )


def origin() -> dict[str, Any]:
    """Return when, at which commit, on which hardware and with which versions a result was measured."""
    return {
        "date": date.today().isoformat(),
        "commit": _COMMIT,
        **({"gpu": _gpu(), "library": _library()} if ON_GPU else {}),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := package_version(name))},
    }


def write_result(name: str, values: dict[str, Any], folder: Path) -> Path:
    """Write the values and their origin to the file NAME.json in `folder`; return its path."""
    require_clean_tree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"origin": origin(), **values}, indent=1) + "\n", encoding="utf-8")
    return path


def machine_folder(results: Path = RESULTS) -> Path:
    """Return the folder below `results` for this processor, which never has files of another one.

    It is the one that has most of its results and none of others, or a new one that is named after it.
    """
    mine = processor()
    folders: dict[Path, list[Any]] = {}
    for file in sorted(results.rglob("*.json")):
        if file.parent != results:  # those of several CPUs are in `results` itself
            folder = results / file.relative_to(results).parts[0]
            folders.setdefault(folder, []).append(origin_of(file).get("processor"))
    own = [folder for folder, owners in folders.items() if set(owners) == {mine}]
    if own:
        return max(own, key=lambda folder: len(folders[folder]))
    name = re.sub(r"[^a-z0-9]+", "-", mine.lower().replace("(r)", "")).strip("-")
    taken = {folder.name for folder in folders}
    return results / next(each for each in chain([name], (f"{name}-{n}" for n in count(2))) if each not in taken)


def origin_of(file: Path) -> dict[str, Any]:
    """Return the origin of a result file; empty if it has none or cannot be read."""
    try:
        origin = json.loads(file.read_text(encoding="utf-8")).get("origin", {})
    except (OSError, ValueError, AttributeError):
        return {}
    return origin if isinstance(origin, dict) else {}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(DEVICE)
    clocks = output_of("nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits")
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9),
        "l2_cache_mb": round(properties.L2_cache_size / 1e6),
        "cuda": torch.version.cuda,
        "driver": driver_version(),
        "max_sm_mhz": clocks.partition("\n")[0],
    }


def _library() -> dict[str, str | None]:
    """Return what identifies the native library: the nvcc and the commit of its build, and a hash of the file."""
    if native.UNAVAILABLE_REASON is not None:
        return {}
    digest = hashlib.sha256(native.path().read_bytes()).hexdigest()[:16]
    built = cuda_build.BUILD
    return {"sha256": digest, **({} if built is None else {"nvcc": built.nvcc, "commit": built.commit})}


# Both are read when the program starts: the code that runs does not change when files are edited meanwhile.
_CHANGED = changed_files(ROOT)
_COMMIT = commit_of(ROOT, bool(_CHANGED))
