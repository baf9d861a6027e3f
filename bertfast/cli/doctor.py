"""`bertfast doctor`: what this machine has, what runs on it by default and why, and whether its kernels are right."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import torch

from bertfast.cli import self_test
from bertfast.ops import __all__ as OPERATIONS
from bertfast.ops import cuda_build, native
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import HAS_TRITON, choose, why_not
from bertfast.ops.matmul import onednn_is_faster
from bertfast.runtime.precision import choose_device, choose_precision, multiplies_bf16

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(kw_only=True)
class DoctorSettings:
    """What to look at.

    Attributes:
        device: Device to look at, cpu, cuda, cuda:1, …; none: what training would use, and with `check` the CPU too.
        check: Run every kernel that runs here, forward and backward, and compare it with a float64 truth.
        only: With `check`, run only the checks whose line holds all of these words, such as: attention triton D=64.
        seconds: With `check`, begin no check after this many seconds; the output lists what was not reached.
        json: Print one JSON object in place of text.
    """

    device: str | None = None
    check: bool = False
    only: tuple[str, ...] = ()
    seconds: float = 55
    json: bool = False


def doctor(settings: DoctorSettings) -> int:
    """Print what is here. Return the exit status: 1 if a kernel is wrong or raised an exception, else 0."""
    if settings.seconds <= 0:
        raise ValueError(f"--seconds must be positive, got {settings.seconds:g}: it is the time for all checks")
    device = choose_device(settings.device)
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    facts = _facts(device, devices)
    if not settings.json:
        print("\n".join(f"{name:11}{what}" for name, what in facts.items()), end="\n\n", flush=True)
    if settings.check:
        return _check(settings, device, facts)
    if settings.json:
        print(json.dumps({"environment": facts}, indent=1))
        return 0
    print("\n".join(_table(devices)))
    advice = _advice(device)
    if advice:
        print("\nFaster would be:", *advice, sep="\n  ")
    return 0


def _check(settings: DoctorSettings, device: torch.device, facts: dict[str, str]) -> int:
    """Run the self-test, print each outcome as it comes, and return the exit status."""
    devices = [device] if settings.device or device.type == "cpu" else [device, torch.device("cpu")]
    outcomes = []
    for outcome in self_test.run(devices, settings.only, settings.seconds):
        if not settings.json:
            if not outcomes:
                print(_HEADING)
            print(_row(outcome), flush=True)
        outcomes.append(outcome)
    if not outcomes:
        words = " ".join(settings.only)
        raise ValueError(f"no check has all words of --only {words}: run without --only, whose lines show the words")
    if settings.json:
        print(json.dumps({"environment": facts, "checks": [asdict(each) for each in outcomes]}, indent=1))
    else:
        print("\n" + _verdict(outcomes))
    return int(any(outcome.status in ("failed", "error") for outcome in outcomes))


def _facts(device: torch.device, devices: list[torch.device]) -> dict[str, str]:
    """What a bug report needs to say of the machine."""
    packages = ("bertfast", "torch", "triton", "transformers", "numpy")
    return {
        "versions": ", ".join(f"{name} {_version(name)}" for name in packages),
        "commit": _commit(),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "processor": f"{_processor()}; {torch.get_num_threads()} threads, {os.cpu_count()} processors",
        "library": _library(),
        **({} if native.ABSENT else {"CUDA C++": cuda_build.summary()}),
        "GPUs": "; ".join(map(_gpu, devices[1:])) or "none",
        "driver": f"{driver_version() or 'none'}; torch was built for CUDA {torch.version.cuda}",
        "fp32 GEMM": f"on a CPU by {'oneDNN, which is faster here' if onednn_is_faster() else 'MKL'}",
        "training": f"on {device} in {_precision(device)}",
    }


_HEADING = (
    f"{'operator':21}{'kernels':10}{'precision':10}{'shape':30}{'error':>8}{'allowed':>9}"
    f"{'forward':>10}{'backward':>10}  result"
)


def _row(outcome: self_test.Outcome) -> str:
    """A line of the table: errors are relative, times in microseconds."""
    numbers = [
        " " * width if value is None else f"{value:{width}{form}}"
        for value, width, form in (
            (outcome.error, 8, ".1e"),
            (outcome.allowed, 9, ".1e"),
            (outcome.forward_us, 10, ".0f"),
            (outcome.backward_us, 10, ".0f"),
        )
    ]
    result = outcome.status if outcome.status == "passed" else f"{outcome.status.upper()}: {outcome.message}"
    kernels = f"{outcome.operator:21}{outcome.implementation:10}{outcome.precision:10}{outcome.shape:30}"
    return kernels + "".join(numbers) + f"  {result}"


def _verdict(outcomes: Sequence[self_test.Outcome]) -> str:
    """How many checks passed, and which did not."""
    count = Counter(outcome.status for outcome in outcomes)
    lines = [f"{count['passed']} of {len(outcomes)} checks passed, {count['not reached']} were not reached."]
    wrong = [outcome for outcome in outcomes if outcome.status in ("failed", "error")]
    if wrong:
        lines.append(f"{len(wrong)} went wrong; please report them with all of this output:")
        lines += [f"  {outcome.label}: {outcome.status}: {outcome.message}" for outcome in wrong]
    return "\n".join(lines)


def _advice(device: torch.device) -> list[str]:
    """What would make it faster here."""
    advice = []
    if native.ABSENT is not None:
        advice.append("the compiled library: install bertfast again where a C++ compiler is")
    if device.type == "cuda":
        if not HAS_TRITON:
            advice.append("Triton, whose kernels are the GPU's: pip install triton")
        return advice
    if torch.get_num_threads() < (os.cpu_count() or 1) // 2:
        advice.append(f"more threads: OMP_NUM_THREADS or a limit leaves {torch.get_num_threads()} of {os.cpu_count()}")
    if native.ABSENT is None and native.instruction_set() == "plain":
        advice.append("a processor with AVX2 or AVX-512, whose vectors the kernels use")
    advice.append("a GPU of sm_80 or later" if not torch.cuda.is_available() else "the GPU that is here: --device cuda")
    return advice


def _commit() -> str:
    """The commit of a checkout, or of an installation from a repository."""
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():
        return _answer("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12") or "unknown"
    try:
        source = json.loads(distribution("bertfast").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        source = {}
    return source.get("vcs_info", {}).get("commit_id", "unknown: this is neither a checkout nor installed from one")


def driver_version() -> str:
    """The version of NVIDIA's driver, empty if there is none."""
    return _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def _answer(*command: str) -> str:
    """The output of a program, empty if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    lines = description.read_text().splitlines() if description.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _library() -> str:
    if native.ABSENT is not None:
        return f"none: {native.ABSENT}"
    sets = ", ".join(native.instruction_sets())
    return f"{native.path()}; instruction sets {sets}; {native.instruction_set()} in use"


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{device} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _precision(device: torch.device) -> str:
    chosen = choose_precision(device)
    if not multiplies_bf16(device):
        return f"{chosen}: it has no instructions for products of bf16"
    return chosen if device.type == "cuda" else f"{chosen}: measured, the faster one here"


def _table(devices: list[torch.device]) -> list[str]:
    """The operations, a line each, with what runs them by default; then why it is not the kernels, where it is not."""
    columns = {
        f"{device} {name}": torch.empty(0, dtype=dtype, device=device)
        for device in devices
        for name, dtype in _DTYPES.items()
    }
    rows = [[name, *(choose(name, None, x) for x in columns.values())] for name in OPERATIONS]
    rows.insert(0, ["operation", *columns])
    lines = [f"{name:22}" + "".join(f"{word:12}" for word in words).rstrip() for name, *words in rows]
    lines.append(f"attention with heads of other sizes than {', '.join(map(str, HEAD_DIMENSIONS))}: reference")
    for column, x in columns.items():
        refusal = why_not("triton" if x.is_cuda else "cpu", "attention", x)
        if refusal is not None:
            lines.append(f"{column}: reference, which is plain PyTorch: {refusal}")
    return lines
