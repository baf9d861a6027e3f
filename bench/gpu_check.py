"""Check the kernels on a GPU: whether their results are correct (3 minutes), and how fast they are (6 minutes).

    make gpu-check-accuracy | gpu-check-speed | gpu-check [PYTHON=…] [RESULTS=FOLDER] [WHEEL=FILE] [PROBES=FILE]
    python -m bench.gpu_check accuracy|speed [--results FOLDER] [--wheel FILE] [--probes FILE]

The Python and the packages of the environment are used, and nothing is installed; a wheel is unpacked into a temporary
folder, and without a wheel the checkout runs. All results go to one file, FOLDER/gpu-check-accuracy.tar or
gpu-check-speed.tar, which is replaced after each part and every few seconds, so that an interrupted run keeps its
results. Each part has a time limit. Parts whose requirements (the native library, a sanitizer) are missing are
skipped, with the reason. Both commands also run without a GPU, at small sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if find_spec("torch") is None:
    sys.exit(f"{sys.executable} has no PyTorch: name another Python: make gpu-check PYTHON=.venv/bin/python")
import torch

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available()
# Time limit of each part in seconds, in the order in which they run: the most important first.
LIMITS = {
    "accuracy": {
        "self-test": 75,
        "graph capture": 30,
        "CUDA C++ self-test": 20,
        "layout probes": 10,
        "memcheck": 25,
    },
    "speed": {
        "ceilings": 15,
        "pretraining step": 60,
        "pretraining step, compiled": 90,
        "attention": 60,
        "add_layer_norm": 15,
        "bias_gelu": 15,
        "gelu_layer_norm": 15,
        "embeddings": 15,
        "linear_cross_entropy": 25,
        "gated_activation": 10,
        "pre_norm": 10,
        "report": 10,
    },
}
BUDGET = {"accuracy": 180, "speed": 360}  # time limit of a command in seconds
RESERVE = 15  # seconds to start, and to stop a part at its limit
CASE_SECONDS = 20  # time limit of one implementation of one case
COMPILE_SECONDS = 35  # time limit of compiling transformers' step
GRACE = 5  # seconds for an interrupted part to write its results
PACKING = 5  # seconds between two versions of the tar file
NO_GPU = "there is no GPU"
OPERATORS: tuple[str, ...] = ("attention", "add_layer_norm", "bias_gelu", "gelu_layer_norm", "embeddings")
OPERATORS += ("linear_cross_entropy", "gated_activation", "pre_norm")
# For a process with `site` on its path, since only there bertfast is complete, or that of the wheel.
DESCRIPTION = """
import json
import sys
from pathlib import Path
from bench.gpu_check import missing_library
from bench.harness import origin, require_clean_tree
require_clean_tree(Path(sys.argv[1]))
print(json.dumps({"origin": origin(), "no_library": missing_library()}))
"""
SELF_TEST = """
import sys
from bertfast.cli.doctor import DoctorSettings, doctor
device, seconds, *words = sys.argv[1:]
raise SystemExit(doctor(DoctorSettings(device=device, check=True, only=tuple(words), seconds=float(seconds))))
"""


@dataclass(frozen=True)
class Part:
    """A part of a check.

    Attributes:
        name: As in LIMITS.
        commands: Run in parallel, each with its own log.
        skip: Why the part is skipped; None if it runs.
        environment: Additional environment variables.
    """

    name: str
    commands: list[list[str]]
    skip: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How a part ended: "passed", "failed", "stopped at its limit" or "skipped", and the last line that it printed."""

    name: str
    status: str
    seconds: float
    last_line: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "check", choices=LIMITS, help="accuracy: errors of the kernels against float64; speed: their times"
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build", help="folder of the tar file (default: build)")
    parser.add_argument("--wheel", type=Path, help="check this wheel instead of the checkout")
    parser.add_argument("--probes", type=Path, help="probes.so built by `make wheel`")
    arguments = parser.parse_args()
    for name in ("wheel", "probes"):
        path = getattr(arguments, name)
        if path and not path.is_file():
            parser.error(f"--{name}: there is no file {path}")
    target = arguments.results.resolve() / f"gpu-check-{arguments.check}.tar"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--results: {target.parent} cannot be created: {error.strerror}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # parts inherit it, even if the shell ignored it
    end = time.monotonic() + BUDGET[arguments.check] - RESERVE
    with TemporaryDirectory() as site, TemporaryDirectory() as folder:
        if arguments.wheel:
            unpack(arguments.wheel, site)
        else:
            lay_out(Path(site, "bertfast"))
        Path(site, "bench").symlink_to(ROOT / "bench")
        origin, no_library = describe(site, target)
        print_environment(origin)
        probes = str(arguments.probes.resolve()) if arguments.probes else None
        found = parts(arguments.check, Path(folder), no_library, probes)
        outcomes = run_all(found, arguments.check, Path(folder), site, target, end, origin)
        report = Path(folder, "report.log")
        if report.exists():
            _, _, table = report.read_text(encoding="utf-8").partition("\n##")
            print("\n##" + table.rpartition("\nsummary.md")[0])
    print(f"all results are in {target}")
    return int(any(outcome.status == "failed" for outcome in outcomes))


def run_all(
    found: Iterator[Part], check: str, folder: Path, site: str, target: Path, end: float, origin: dict[str, Any]
) -> list[Outcome]:
    """Run the parts until `end`; after each part, print how it ended and write all results to `target`."""
    outcomes = []
    for part in found:
        limit: float = LIMITS[check][part.name]
        if part.name != "report":
            limit = min(limit, end - time.monotonic() - LIMITS[check].get("report", 0))
        outcome = run(part, folder, site, limit, lambda: pack(folder, target))
        outcomes.append(outcome)
        print(f"{outcome.name:27}{outcome.seconds:5.0f} s  {outcome.status}: {outcome.last_line}", flush=True)
        values = {"origin": origin, "check": check, "parts": [asdict(outcome) for outcome in outcomes]}
        (folder / "gpu_check.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        pack(folder, target)
    return outcomes


def pack(folder: Path, target: Path) -> None:
    """Write all files of `folder` to the tar file `target`, which is replaced atomically."""
    unfinished = target.with_suffix(".unfinished")
    with tarfile.open(unfinished, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, f"{target.stem}/{file.name}")
    os.replace(unfinished, target)


def describe(site: str, target: Path) -> tuple[dict[str, Any], str | None]:
    """Return the origin of results, and why there are no CUDA kernels of the native library (None: there are).

    Raises:
        SystemExit: `target` must not be written, because there are uncommitted changes, or bertfast cannot be imported.
    """
    command = [sys.executable, "-c", DESCRIPTION, str(target)]
    ran = subprocess.run(command, cwd=ROOT, env=with_site(site), capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr.strip())
    description = json.loads(ran.stdout.splitlines()[-1])
    return description["origin"], description["no_library"]


def with_site(site: str) -> dict[str, str]:
    """Return the environment of a process that finds bertfast and bench in the folder `site`."""
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    # With PYTHONSAFEPATH the current folder is not on the path, where `kernels` would hide the package of that name.
    return os.environ | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "PYTHONUNBUFFERED": "1"}


def print_environment(origin: dict[str, Any]) -> None:
    """Print the hardware, the versions and the commit."""
    gpu = ", ".join(f"{name} {value}" for name, value in origin.get("gpu", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    print(gpu or origin["processor"])
    print(f"Python {origin['python']}, {versions}")
    print(f"commit {origin['commit'] or 'unknown'}\n", flush=True)


def missing_library() -> str | None:
    """Return why the CUDA kernels of the native library are not available; None if they are."""
    from bertfast.ops import cuda_build, native

    if native.UNAVAILABLE_REASON is not None:
        return f"not available: {native.UNAVAILABLE_REASON}"
    reason = cuda_build.unsupported_reason("bias_gelu")
    return None if reason is None else f"not available: {reason}"


def lay_out(package: Path) -> None:
    """Create the package from links to the checkout, where its folder `kernels` is next to it."""
    package.mkdir()
    for entry in [*(ROOT / "bertfast").iterdir(), ROOT / "kernels"]:
        if not (package / entry.name).is_symlink():
            (package / entry.name).symlink_to(entry)


def unpack(wheel: Path, site: str) -> None:
    """Install a wheel, without its dependencies, into the folder `site`."""
    options = ["--no-deps", "--no-index", "--quiet", "--disable-pip-version-check", "--target", site]
    command = [sys.executable, "-m", "pip", "install", *options, str(wheel)]
    installed = subprocess.run(command, capture_output=True, text=True)
    if installed.returncode:
        raise SystemExit(f"{wheel} cannot be installed: {installed.stderr.strip()}")


def parts(check: str, folder: Path, no_library: str | None, probes: str | None) -> Iterator[Part]:
    """Yield the parts of a check in their order."""
    yield from accuracy_parts(no_library, probes) if check == "accuracy" else speed_parts(folder)


def accuracy_parts(no_library: str | None, probes: str | None) -> Iterator[Part]:
    """Yield the parts that check results: all kernels against float64, a CUDA graph, CUDA C++, and a sanitizer."""
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    no_gpu = None if ON_GPU else NO_GPU
    yield Part("self-test", self_tests(LIMITS["accuracy"]["self-test"] - 10))
    yield Part(
        "graph capture",
        [[*pytest, "tests/runtime/test_cuda_graph.py", "-k", "cuda_graph"]],
        no_gpu or needs("tokenizers"),
    )
    seconds = LIMITS["accuracy"]["CUDA C++ self-test"] - 5
    yield Part("CUDA C++ self-test", [self_test("cuda", seconds, "cuda")], no_gpu or no_library)
    nothing = None if probes or shutil.which("nvcc") else "not available: neither --probes nor nvcc"
    yield Part(
        "layout probes",
        [[*pytest, "tests/emulation/test_probes.py"]],
        no_gpu or nothing,
        {"BERTFAST_PROBES": probes} if probes else {},
    )
    sanitizer = None if shutil.which("compute-sanitizer") else "there is no compute-sanitizer"
    checked = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"]
    seconds = LIMITS["accuracy"]["memcheck"] - 5
    yield Part(
        "memcheck",
        [[*checked, *self_test("cuda", seconds, "attention", "triton", "bf16", f"D={d}")] for d in (32, 128)],
        no_gpu or sanitizer,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that the sanitizer sees the end of each tensor
    )


def self_test(device: str, seconds: float, *words: str) -> list[str]:
    """Return the command that runs the checks whose names contain all of `words`."""
    return [sys.executable, "-c", SELF_TEST, device, str(seconds), *words]


def self_tests(seconds: float) -> list[list[str]]:
    """Return commands that together check every Triton kernel.

    They run in parallel because compilation takes most of the time and is single-threaded, and so that a kernel that
    crashes its process does not stop the others.
    """
    if not ON_GPU:
        return [self_test("cpu", seconds, "bias_gelu")]
    attention = [
        self_test("cuda", seconds, "attention", "triton", precision, f"D={dimension}")
        for precision in ("bf16", "fp32", "fp16")
        for dimension in (64, 32, 128)
    ]
    others = [name for name in (*OPERATORS, "gather", "linear_gelu", "rotary") if name != "attention"]
    return [
        *attention,
        *(self_test("cuda", seconds, name, "triton") for name in others),
        self_test("cuda", seconds, "reference"),
    ]


def speed_parts(folder: Path) -> Iterator[Part]:
    """Yield the parts that measure speed: ceilings, a pre-training step and the operators, with their alternatives."""
    python, results = sys.executable, ["--results", str(folder)]
    yield Part("ceilings", [[python, "-m", "bench.ceilings", *results]])
    step = [python, "-m", "bench.end_to_end.pretraining_step", *results, "--repeats", "5"]
    cases = ["gpu-base-128", "gpu-base-512"] if ON_GPU else ["trial"]
    yield Part("pretraining step", [[*step, *cases, "--against", "transformers-sdpa"]], needs("transformers"))
    compiled = ["--against", "transformers-compile", "--compile-seconds", str(COMPILE_SECONDS), "--suffix", "compiled"]
    no_gpu = None if ON_GPU else NO_GPU
    yield Part("pretraining step, compiled", [[*step, *cases, *compiled]], no_gpu or needs("transformers"))
    benchmark = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--case-seconds={CASE_SECONDS}"]
    benchmark.append(f"--shapes={'main' if ON_GPU else 'small'}")
    for name in OPERATORS:
        # For attention only the alternatives that are usually the fastest.
        chosen = ["-k", "bertfast- or varlen or cudnn"] if name == "attention" and ON_GPU else ["-k", "not definition"]
        files = [f"--benchmark-json={folder / name}.json", f"bench/ops/{name}.py"]
        # Without a GPU one operator shows that the program runs; tests/test_bench.py runs all of them.
        skip = None if ON_GPU or name == OPERATORS[0] else NO_GPU
        yield Part(name, [[*benchmark, *chosen, *files]], skip or needs("pytest_benchmark"))
    yield Part("report", [[python, "-m", "bench.report", str(folder)]])


def needs(package: str) -> str | None:
    """Return why a part that needs a package is skipped; None if the package is installed."""
    return None if find_spec(package) else f"{package} is not installed"


def run(part: Part, folder: Path, site: str, limit: float, keep: Callable[[], None] = lambda: None) -> Outcome:
    """Run a part for at most `limit` seconds, with the output of each command in a log in `folder`.

    Args:
        part: What to run.
        folder: Folder of the logs.
        site: Folder with bertfast and bench, for PYTHONPATH.
        limit: Time limit in seconds.
        keep: Called every few seconds.
    """
    if part.skip or limit <= 0:
        return Outcome(part.name, "skipped", 0.0, part.skip or "no time is left")
    environment = with_site(site) | part.environment
    logs = [folder / f"{part.name.replace(' ', '_')}{'_' * bool(i)}{i or ''}.log" for i in range(len(part.commands))]
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        processes = []
        for command, log in zip(part.commands, logs, strict=True):
            output = stack.enter_context(log.open("w", encoding="utf-8"))
            output.write(f"$ {' '.join(word for word in command if word != SELF_TEST)}\n")
            output.flush()
            processes.append(
                subprocess.Popen(
                    command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        statuses = _wait(processes, started + limit, keep)
    status = next(status for status in ("failed", "stopped at its limit", "passed") if status in statuses)
    worst = logs[statuses.index(status)].read_text(encoding="utf-8", errors="replace")
    lines = [line for line in worst.splitlines()[1:] if line.strip()]
    return Outcome(part.name, status, time.monotonic() - started, lines[-1].strip("= ") if lines else "no output")


def _wait(processes: Sequence[subprocess.Popen[bytes]], end: float, keep: Callable[[], None]) -> list[str]:
    """Return how each process ended; at `end`, running ones are interrupted and then killed with their children."""
    try:
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            before = time.monotonic()
            while time.monotonic() < min(end, before + PACKING) and any(
                process.poll() is None for process in processes
            ):
                time.sleep(0.05)
            keep()
        stopped = [process for process in processes if process.poll() is None]
        for process in stopped:
            process.send_signal(signal.SIGINT)  # pytest then writes its results
        grace = time.monotonic() + GRACE
        for process in stopped:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(grace - time.monotonic(), 0))
        return [
            "stopped at its limit" if process in stopped else "failed" if process.returncode else "passed"
            for process in processes
        ]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and its children
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
