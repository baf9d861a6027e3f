"""Install commits of this repository side by side, to measure them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.harness import ON_GPU
from bench.result_files import ROOT

WORK = ROOT / "build" / "compare"
NATIVE = ("csrc", "setup.py", "build_support")  # sources of the native library
LIBRARY = ("_C.abi3.so", "_C.cuda.json")


@dataclass
class Commit:
    """An installed commit.

    Attributes:
        name: As it was given.
        sha: Its full hash.
        folder: Folder to put on the path.
        values: By case, a number computed from the outputs.
        reasons: By case, why it did not run.
    """

    name: str
    sha: str
    folder: Path
    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def git(*arguments: str) -> str:
    """Return what git prints.

    Raises:
        SystemExit: It fails, with its message.
    """
    ran = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(f"git {arguments[0]}: {ran.stderr.strip() or ran.returncode}")
    return ran.stdout.strip()


def resolve(ref: str) -> Commit:
    """Return the commit that `ref` names.

    Raises:
        SystemExit: There is none.
    """
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}"]
    sha = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    if not sha:
        raise SystemExit(f"there is no commit {ref!r}: name a hash, branch or tag that `git log` shows")
    return Commit(ref, sha, WORK / sha[:12])


def same_native_sources(*refs: str) -> bool:
    """Return whether two commits, or one and the checkout, have the same sources of the native library."""
    return not git("diff", "--name-only", *refs, "--", *NATIVE)


def install(commits: dict[str, Commit], rebuild: bool) -> None:
    """Install the commits into their folders, each with the native library of its sources.

    Equal sources get the same file: that of the checkout, if it is of these sources too, or one that is compiled.
    """
    base, head = commits["base"], commits["head"]
    for commit in {commit.sha: commit for commit in commits.values()}.values():
        if rebuild:
            shutil.rmtree(commit.folder, ignore_errors=True)
    same = same_native_sources(base.sha, head.sha)
    checkout = ROOT / "bertfast"
    from_checkout = same and (checkout / LIBRARY[0]).is_file() and same_native_sources(head.sha)
    _install(head, checkout if from_checkout else None)
    if base.sha != head.sha:
        _install(base, head.folder / "bertfast" if same else None)


def _install(commit: Commit, library_folder: Path | None) -> None:
    """Install a commit with the library in `library_folder`; None: compile it."""
    step = "build" if library_folder is None else "build_py"
    done = commit.folder / "installed.txt"  # the last step, written at the end
    if not done.is_file() or (library_folder is None and done.read_text(encoding="utf-8") != "build"):
        compiling = ", compiling the native library, which takes minutes" * (library_folder is None)
        print(f"installing {commit.name} ({commit.sha[:9]}){compiling}", file=sys.stderr, flush=True)
        shutil.rmtree(commit.folder, ignore_errors=True)
        commit.folder.mkdir(parents=True)
        _run_setup(commit, step)
    if library_folder is not None:
        for name in LIBRARY:
            if (library_folder / name).is_file():
                shutil.copy2(library_folder / name, commit.folder / "bertfast" / name)
    done.write_text(step, encoding="utf-8")


def _run_setup(commit: Commit, step: str) -> None:
    """Run a step of setup.py in a worktree of the commit.

    Raises:
        SystemExit: It fails.
    """
    environment = os.environ | ({} if ON_GPU else {"NVCC": ""})  # a CPU needs no CUDA kernels
    with TemporaryDirectory(dir=WORK) as folder:
        checkout = Path(folder, "checkout")
        git("worktree", "add", "--quiet", "--detach", str(checkout), commit.sha)
        try:
            command = [sys.executable, "setup.py", "--quiet", step, "--build-lib", str(commit.folder)]
            ran = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        finally:
            git("worktree", "remove", "--force", str(checkout))
    if ran.returncode:
        raise SystemExit(f"{commit.name} cannot be installed:\n{ran.stdout}{ran.stderr}")
