"""Check the kernels on a GPU: are they right (3 minutes), how fast (6 minutes), and as fast as predicted (4 minutes)?

    make gpu-check | gpu-check-accuracy | gpu-check-speed | gpu-check-predictions
        [PYTHON=…] [RESULTS=FOLDER] [WHEEL=FILE] [PROBES=FILE]
    python -m bench.gpu_check accuracy|speed|predictions [--results FOLDER] [--wheel FILE] [--probes FILE]

The Python and the packages of the environment are used, and nothing is installed; a wheel is unpacked into a temporary
folder, and without a wheel the checkout runs. All results go to one file, such as FOLDER/gpu-check-accuracy.tar, which
is replaced after each part and every few seconds, so that an interrupted run keeps its results. Each part has a time
limit. Parts whose requirements (the native library, probes) are missing are skipped, with the reason. All commands also
run without a GPU, at small sizes and with longer limits. `gpu-check` is accuracy and speed.

The exit status is 1 if a part failed; for accuracy also if one did not finish, so that 0 says that all was checked.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

if find_spec("torch") is None:
    sys.exit(f"{sys.executable} has no PyTorch: name another Python: make gpu-check PYTHON=.venv/bin/python")
import torch

from bench import gpu_clocks
from bench.part_runner import NOT_REACHED, ROOT, STOPPED, Outcome, Part, exit_on_signals, pack, run, with_site

ON_GPU = torch.cuda.is_available()
# Time limit of each part in seconds, in the order in which they run: the most important first.
LIMITS = {
    "accuracy": {
        "self-test": 80,
        "graph capture": 45,
        "CUDA C++ self-test": 25,
        "layout probes": 15,
    },
    "speed": {
        "ceilings": 15,
        "pretraining step": 55,
        "attention": 55,
        "other operators": 95,
        "CUDA C++ kernels": 30,
        "pretraining step, compiled": 85,
        "report": 10,
    },
    "predictions": {
        "ceilings": 15,
        "step of bertfast pretrain": 55,
        "predicted kernels": 85,
        "predicted CUDA C++ kernels": 60,
        "report": 10,
    },
}
BUDGET = {"accuracy": 180, "speed": 360, "predictions": 240}  # time limit of a command in seconds
RESERVE = 15  # seconds to start, and to stop a part at its limit
PATIENCE = 1 if ON_GPU else 5  # factor of the limits: without a GPU it is a rehearsal, and the machine may be busy
# How a part ends if the exit status is to be 1. A benchmark that is stopped keeps what it has measured.
FAILURES = {"accuracy": ("failed", STOPPED, NOT_REACHED), "speed": ("failed",), "predictions": ("failed",)}
CASE_SECONDS = 30  # time limit of one implementation of one case; the first call compiles up to four kernels
COMPILE_SECONDS = 60  # time limit of compiling transformers' step
NO_GPU = "there is no GPU"
OPERATORS: tuple[str, ...] = ("attention", "add_layer_norm", "bias_gelu", "gelu_layer_norm", "embeddings")
OPERATORS += ("linear_cross_entropy", "gated_activation", "pre_norm", "rotary", "linear_gelu")
MOST_KERNELS = ("add_layer_norm", "pre_norm")  # to compile in the self-test
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
GRAPH_TEST = "tests/runtime/test_cuda_graph.py::test_a_step_in_a_cuda_graph_is_bitwise_identical"
GRAPH_KINDS = ("adamw", "bf16, no pairs", "a scaled loss")  # in fp32, bf16 and fp16
# For a process with `site` on its path, since only there bertfast is complete, or that of the wheel.
DESCRIPTION = """
import json
import sys
from pathlib import Path
from bench.gpu_check import launch_error, missing_library
from bench.result_files import origin, require_clean_tree
require_clean_tree(Path(sys.argv[1]))
if (error := launch_error()) is not None:
    sys.exit(error)
print(json.dumps({"origin": origin(), "no_library": missing_library()}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "check",
        choices=LIMITS,
        help="accuracy: errors of the kernels against float64; speed: their times; predictions: kernels one by one",
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
    exit_on_signals()
    end = time.monotonic() + PATIENCE * (BUDGET[arguments.check] - RESERVE)
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
        with gpu_clocks.recorded_clocks(Path(folder, gpu_clocks.FILE)):
            outcomes = run_all(found, arguments.check, Path(folder), site, target, end, origin)
        print_tables(Path(folder, "report.log"))
    print(f"all results are in {target}")
    return exit_status(arguments.check, outcomes)


def run_all(
    found: Iterator[Part], check: str, folder: Path, site: str, target: Path, end: float, origin: dict[str, Any]
) -> list[Outcome]:
    """Run the parts until `end`; after each part, print how it ended and write all results to `target`."""

    def keep() -> None:
        with contextlib.suppress(OSError):  # a file may shrink while it is read; the next version will be complete
            pack(folder, target)

    outcomes = []
    for part in found:
        limit: float = PATIENCE * LIMITS[check][part.name]
        if part.name != "report":
            limit = min(limit, end - time.monotonic() - PATIENCE * LIMITS[check].get("report", 0))
        outcome = run(part, folder, site, limit, keep)
        outcomes.append(outcome)
        print(f"{outcome.name:27}{outcome.seconds:5.0f} s  {outcome.status}: {outcome.last_line}", flush=True)
        for problem in outcome.problems:
            print(f"  {problem}", flush=True)
        values = {"origin": origin, "check": check, "parts": [asdict(outcome) for outcome in outcomes]}
        (folder / "gpu_check.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        pack(folder, target)
    return outcomes


def exit_status(check: str, outcomes: Sequence[Outcome]) -> int:
    """Return 1 if a part failed, or did not finish and its results count, else 0."""
    return int(any(outcome.status in FAILURES[check] for outcome in outcomes))


def print_tables(report: Path) -> None:
    """Print the tables of the log of `bench.report`, if there is one."""
    if report.exists():
        lines = report.read_text(encoding="utf-8").splitlines()
        print("\n".join(line for line in lines if not line or line.startswith(("|", "##"))))


def describe(site: str, target: Path) -> tuple[dict[str, Any], str | None]:
    """Return the origin of results, and why there are no CUDA kernels of the native library (None: there are).

    Raises:
        SystemExit: `target` must not be written, because there are uncommitted changes, bertfast cannot be imported, or
            Triton cannot launch kernels.
    """
    command = [sys.executable, "-c", DESCRIPTION, str(target)]
    ran = subprocess.run(command, cwd=ROOT, env=with_site(site), capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr.strip())
    description = json.loads(ran.stdout.splitlines()[-1])
    return description["origin"], description["no_library"]


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
    if reason is None and ON_GPU:
        reason = cuda_build.unsupported_gpu_reason("bias_gelu", torch.device("cuda"))
    return None if reason is None else f"not available: {reason}"


def launch_error() -> str | None:
    """Return why Triton cannot launch kernels; None if it can, or if there is no GPU.

    Triton compiles a module in C before its first launch on a machine.
    """
    if not ON_GPU or find_spec("triton") is None:
        return None
    from triton.runtime import driver

    try:
        driver.active.get_current_device()
    except Exception as error:
        needed = "a C compiler (gcc, clang or that in CC) and Python.h (the package python3-dev)"
        return f"Triton cannot launch kernels, for which it requires {needed}: {error}"
    return None


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
    if check == "accuracy":
        yield from accuracy_parts(no_library, probes)
    else:
        yield from speed_parts(folder, no_library) if check == "speed" else prediction_parts(folder, no_library)


def accuracy_parts(no_library: str | None, probes: str | None) -> Iterator[Part]:
    """Yield the parts that check results: kernels against float64, a CUDA graph, CUDA C++, and layouts of operands."""
    no_gpu = None if ON_GPU else NO_GPU
    yield Part("self-test", self_tests())
    graphs = [[*PYTEST, f"{GRAPH_TEST}[{kind}]"] for kind in GRAPH_KINDS]
    yield Part("graph capture", graphs, no_gpu or needs("tokenizers"))
    yield Part("CUDA C++ self-test", [self_test("cuda", "cuda")], no_gpu or no_library)
    no_probes = None if probes else "not available: no --probes, which `make wheel` builds"
    environment = {"BERTFAST_PROBES": probes} if probes else {}
    yield Part("layout probes", [[*PYTEST, "tests/emulation/test_probes.py"]], no_gpu or no_probes, environment)


def self_test(device: str, *words: str) -> list[str]:
    """Return the command that runs the checks whose names contain all of `words`."""
    return [sys.executable, "-m", "bench.gpu_self_test", device, *words]


def self_tests() -> list[list[str]]:
    """Return commands that together check every Triton kernel.

    They run in parallel because compilation takes most of the time and is single-threaded, and so that a kernel that
    crashes its process does not stop the others.
    """
    if not ON_GPU:
        return [self_test("cpu", "bias_gelu")]
    attention = [
        self_test("cuda", "attention", "triton", precision, f"D={dimension}", dropout)
        for precision in ("bf16", "fp32", "fp16")
        for dimension in (64, 32, 128)
        for dropout in ("dropout", "no-dropout")
    ]
    others = [
        self_test("cuda", name, "triton", *part)
        for name in (*OPERATORS, "gather")
        if name != "attention"
        for part in ([("dropout",), ("no-dropout",)] if name in MOST_KERNELS else [()])
    ]
    return [*attention, *others, self_test("cuda", "reference")]


def speed_parts(folder: Path, no_library: str | None) -> Iterator[Part]:
    """Yield the parts that measure speed: ceilings, a pre-training step and the operators, with their alternatives."""
    python, results = sys.executable, ["--results", str(folder)]
    no_gpu = None if ON_GPU else NO_GPU
    yield Part("ceilings", [[python, "-m", "bench.ceilings", *results]])
    step = [python, "-m", "bench.end_to_end.pretraining_step", *results, "--repeats", "5"]
    cases = ["gpu-base-128", "gpu-base-512"] if ON_GPU else ["trial"]
    yield Part("pretraining step", [[*step, *cases, "--against", "transformers-sdpa"]], needs("transformers"))
    attention, *others = OPERATORS
    # For attention only the alternatives that are usually the fastest.
    chosen = "(bertfast- or varlen or cudnn) and not bertfast-cuda" if ON_GPU else "not definition"
    no_benchmark = needs("pytest_benchmark")
    yield Part(attention, [benchmark(folder, attention, chosen, attention)], no_benchmark)
    # Without a GPU one operator shows that the program runs; tests/test_bench.py runs all of them.
    chosen = "not (definition or bertfast-cuda)"
    yield Part("other operators", [benchmark(folder, "operators", chosen, *others)], no_gpu or no_benchmark)
    # On their own, because one that hangs or crashes ends its process.
    chosen = "bertfast-cuda"
    yield Part(
        "CUDA C++ kernels", [benchmark(folder, "cuda", chosen, *OPERATORS)], no_gpu or no_library or no_benchmark
    )
    compiled = ["--against", "transformers-compile", "--compile-seconds", str(COMPILE_SECONDS), "--suffix", "compiled"]
    yield Part("pretraining step, compiled", [[*step, cases[0], *compiled]], no_gpu or needs("transformers"))
    yield Part("report", [[python, "-m", "bench.report", str(folder)]])


def prediction_parts(folder: Path, no_library: str | None) -> Iterator[Part]:
    """Yield the parts that measure what `bench.sass_model` predicts: steps of a pre-training run, single kernels."""
    python, results = sys.executable, ["--results", str(folder)]
    yield Part("ceilings", [[python, "-m", "bench.ceilings", *results]])
    step = [python, "-m", "bench.end_to_end.train_step", *results]
    yield Part("step of bertfast pretrain", [[*step, *([] if ON_GPU else ["trial"])]], needs("transformers"))
    missing = needs("pytest_benchmark") if ON_GPU else NO_GPU
    options = ["--kernels", "--benchmark-disable"]
    of_triton = benchmark(folder, "kernels", "bertfast- and not bertfast-cuda", *OPERATORS, shapes="predicted")
    yield Part("predicted kernels", [[*of_triton, *options]], missing)
    of_cuda = benchmark(folder, "cuda", "bertfast-cuda", *OPERATORS, shapes="predicted")
    yield Part("predicted CUDA C++ kernels", [[*of_cuda, *options]], missing or no_library)
    yield Part("report", [[python, "-m", "bench.report", str(folder)]])


def benchmark(folder: Path, name: str, chosen: str, *operators: str, shapes: str = "main") -> list[str]:
    """Return the command that measures operators, with their ceilings, and writes NAME.json.

    Args:
        folder: Folder of the JSON file and of the ceilings that were measured before.
        name: Name of the JSON file.
        chosen: Which implementations run, as pytest's `-k`.
        operators: Files of bench/ops.
        shapes: Sizes on a GPU.
    """
    options = [f"--case-seconds={CASE_SECONDS}", f"--shapes={shapes if ON_GPU else 'small'}", "-k", chosen]
    options += [f"--ceilings={folder / 'ceilings.json'}", f"--benchmark-json={folder / name}.json"]
    return [*PYTEST, *options, *(f"bench/ops/{operator}.py" for operator in operators)]


def needs(package: str) -> str | None:
    """Return why a part that needs a package is skipped; None if the package is installed."""
    return None if find_spec(package) else f"{package} is not installed"


if __name__ == "__main__":
    sys.exit(main())
