"""Everything that only a GPU can tell, in one command that ends inside nine minutes (with --fast inside three).

    make gpu-check [PYTHON=…] [RESULTS=FOLDER] [WHEEL=FILE] [FAST=1]
    python bench/gpu_check.py [--results FOLDER] [--wheel FILE] [--fast]

The environment's own Python and packages are used and nothing is installed; a wheel is unpacked into a temporary
folder, and without one the checkout is what runs. Each part is stopped at its own limit, so that what was measured is
always written: FOLDER holds a log of each part, JSON, summary.md and plots. Without a GPU it runs too, at small sizes,
and says what it skips.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))
from harness import ON_GPU, RESULTS, origin, write_result

ROOT = Path(__file__).parents[1]
# part: (seconds at most, seconds with --fast); 0: left out
LIMITS = {
    "kernel tests": (120, 60),
    "CUDA C++ tests": (60, 40),
    "layout probes": (45, 45),
    "other tests": (30, 0),
    "training": (40, 0),
    "memcheck": (30, 0),
    "racecheck": (30, 0),
    "initcheck": (20, 0),
    "synccheck": (20, 0),
    "ceilings": (20, 20),
    "attention": (90, 40),
    "add_layer_norm": (40, 20),
    "bias_gelu": (25, 15),
    "gelu_layer_norm": (30, 15),
    "embed": (35, 15),
    "linear_gelu": (25, 15),
    "linear_cross_entropy": (40, 25),
    "operations": (60, 60),  # all of them, where there is no GPU
    "pretraining step": (170, 0),
    "report": (15, 15),
}
OPERATIONS = [name for name in LIMITS if (ROOT / "bench" / "ops" / f"{name}.py").exists()]
TOTAL = (505, 145)  # seconds after which no part but the report goes on
GRACE = 5  # seconds to write what there is, for a part that was interrupted
NO_GPU = "there is no GPU"


@dataclass(frozen=True)
class Part:
    """A command of the check, and what it finds in its environment; `skip` says why it does not run."""

    name: str
    command: list[str]
    skip: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "stopped at its limit" or "skipped", and the last line it printed."""

    name: str
    status: str
    seconds: float
    last_line: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu-check", help="folder for all that is written")
    parser.add_argument("--wheel", type=Path, help="check this wheel and not the checkout")
    parser.add_argument("--fast", action="store_true", help="the kernels' tests and the main shapes, in three minutes")
    arguments = parser.parse_args()
    if arguments.wheel and not arguments.wheel.is_file():
        parser.error(f"there is no wheel {arguments.wheel}")
    folder = arguments.results.resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"results cannot be written to {folder}: {error.strerror}")
    if (folder / "gpu_check.json").exists():  # an earlier check's, which would be mixed with this one's
        for pattern in ("*.json", "*.log", "*.png", "summary.md"):
            for file in folder.glob(pattern):
                file.unlink()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # parts inherit it, also where a shell had it ignored
    print_environment()
    outcomes, end = [], time.monotonic() + TOTAL[arguments.fast]
    with TemporaryDirectory() as site:
        if arguments.wheel:
            unpack(arguments.wheel, site)
        else:
            lay_out(Path(site, "bertfast"))
        for part in parts(folder, arguments.fast):
            limit = LIMITS[part.name][arguments.fast]
            if part.name != "report":
                limit = min(limit, end - time.monotonic())
            outcome = run(part, folder, site, limit)
            outcomes.append(outcome)
            print(f"{outcome.name:22}{outcome.seconds:5.0f} s  {outcome.status}: {outcome.last_line}", flush=True)
            write_result("gpu_check", {"fast": arguments.fast, "parts": [asdict(one) for one in outcomes]}, folder)
    print("\n" + (folder / "report.log").read_text(encoding="utf-8"))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def print_environment() -> None:
    """Say what the check runs on."""
    here = origin()
    print(", ".join(f"{name} {value}" for name, value in here.get("gpu", {}).items()) or here["processor"])
    print(f"Python {here['python']}, " + ", ".join(f"{name} {version}" for name, version in here["versions"].items()))
    print(f"commit {here['commit']}\n", flush=True)


def lay_out(package: Path) -> None:
    """Make the package importable from links to the checkout, where its folder `kernels` lies beside it."""
    package.mkdir()
    for entry in (ROOT / "bertfast").iterdir():
        (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(ROOT / "kernels")


def unpack(wheel: Path, site: str) -> None:
    """Install a wheel alone into the folder `site`."""
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", site]
    command = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        raise SystemExit(f"{wheel} cannot be installed: {installed.stderr.strip()}")


def parts(folder: Path, fast: bool) -> Iterator[Part]:
    """The parts in their order."""
    python, pytest = sys.executable, [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    no_gpu = None if ON_GPU else NO_GPU
    kernel_tests = [python, "tests/kernels/in_parts.py", "--maxfail=3", "-p", "no:cacheprovider"]
    yield Part("kernel tests", kernel_tests, no_gpu)
    yield Part("CUDA C++ tests", kernel_tests, no_gpu, {"BERTFAST_TESTED": "cuda"})
    # What the emulation takes the instructions to do, asked of the GPU itself.
    yield Part("layout probes", [*pytest, "tests/emulation/test_probes.py"], no_gpu)
    yield Part("other tests", [*pytest, "--maxfail=5", "tests/ops", "tests/model"], no_gpu)
    # A step in a CUDA graph, among others; the program wants more packages than the model.
    packages = [name for name in ("tokenizers", "tyro", "safetensors") if not find_spec(name)]
    missing = f"there is no {', '.join(packages)}" if packages else None
    yield Part("training", [*pytest, "--maxfail=3", "tests/training/test_graph.py"], no_gpu or missing)

    benchmark = None if find_spec("pytest_benchmark") else "pytest-benchmark is not installed"
    checked = [*pytest, "--shapes=small", "--benchmark-disable", "-k", "bertfast-", "bench/ops/attention.py"]
    sanitizer = None if shutil.which("compute-sanitizer") else "there is no compute-sanitizer"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *checked]
        yield Part(tool, command, no_gpu or sanitizer or benchmark)

    yield Part("ceilings", [python, "bench/harness.py", "--results", str(folder)])
    shapes = ("main" if fast else "all") if ON_GPU else "small"
    # On a GPU in a process each, since a broken kernel takes along all that its process was to measure.
    operations = {name: f"bench/ops/{name}.py" for name in OPERATIONS} if ON_GPU else {"operations": "bench/ops"}
    for name, files in operations.items():
        options = [f"--shapes={shapes}", f"--benchmark-json={folder / name}.json"]
        yield Part(name, [*pytest, *options, files], benchmark)

    step = [python, "bench/end_to_end/pretraining_step.py", "--results", str(folder), *([] if ON_GPU else ["trial"])]
    yield Part("pretraining step", step, None if find_spec("transformers") else "transformers is not installed")
    yield Part("report", [python, "bench/report.py", str(folder)])


def run(part: Part, folder: Path, site: str, limit: float) -> Outcome:
    """Run a part for at most `limit` seconds, its output to FOLDER/NAME.log."""
    if part.skip or limit <= 0:
        why = part.skip or ("--fast leaves it out" if limit == 0 else "no time is left")
        return Outcome(part.name, "skipped", 0.0, why)
    # Safe path: the checkout's root, where `kernels` is the name of another package, stays out of the way.
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    environment = os.environ | part.environment | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}
    if part.command[0] == "compute-sanitizer":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # or it would not see where a tensor ends
    log = folder / f"{part.name.replace(' ', '_')}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        status = _wait(process, limit)
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return Outcome(part.name, status, time.monotonic() - started, lines[-1].strip("= ") if lines else "no output")


def _wait(process: subprocess.Popen, limit: float) -> str:
    try:
        return "passed" if process.wait(limit) == 0 else "failed"
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # pytest then writes what it has
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        return "stopped at its limit"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and all that it started
        process.wait()


if __name__ == "__main__":
    sys.exit(main())
