"""`bertfast doctor`: report hardware, versions and the kernels that run by default, and test the kernels."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bertfast.cli import self_test
from bertfast.ops import __all__ as OPERATIONS
from bertfast.ops import cuda_build, native
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import HAS_TRITON, resolve, unsupported_reason
from bertfast.ops.matmul import onednn_depth
from bertfast.runtime.machine import commit, output_of, processor
from bertfast.runtime.precision import choose_device, choose_precision, has_bf16_gemm
from bertfast.runtime.settings import Positive, Settings, flag

_SECONDS = 55  # time limit of `--check`: with the start of the process, a minute
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_PACKAGES = (
    "bertfast",
    "torch",
    "triton",
    "transformers",
    "tokenizers",
    "peft",
    "accelerate",
    "onnxruntime",
    "numpy",
)


@dataclass(frozen=True, kw_only=True)
class DoctorSettings(Settings):
    """What to report and check.

    Attributes:
        device: Device such as "cpu" or "cuda:0". If not given: a GPU if one is available, and with `--check` the CPU as
            well.
        check: Run every available kernel, forward and backward, and compare it with a float64 reference, as far as the
            time limit allows.
        only: With `--check`, run only the checks whose line contains all of these words, such as attention D=64;
            no-dropout selects those whose line has no dropout.
        seconds: With `--check`, time limit in seconds, after which no check starts. If not given: 55.
        json: Print one JSON object instead of text.
    """

    device: str | None = None
    check: bool = False
    only: tuple[str, ...] = ()
    seconds: Positive | None = None
    json: bool = False

    def validate(self) -> None:
        for name in ("only", "seconds"):
            if getattr(self, name) and not self.check:
                raise ValueError(f"{flag(name)} limits the checks of the kernels, so it requires --check")


@dataclass(frozen=True)
class Dispatch:
    """What runs each operator by default.

    Attributes:
        operators: Implementation by operator and by device and dtype, such as "cpu fp32".
        fallback_reasons: By device and dtype, why the reference runs in place of the kernels; only where it does.
        head_dimensions: Head dimensions that the attention kernels support; the reference runs all others.
    """

    operators: dict[str, dict[str, str]]
    fallback_reasons: dict[str, str]
    head_dimensions: tuple[int, ...]


def doctor(settings: DoctorSettings) -> int:
    """Print the report.

    Returns:
        The exit status: 1 if a check failed or raised an exception, else 0.
    """
    device = choose_device(settings.device)
    if not settings.json:
        print_environment(device)
        if settings.check:
            return _exit_status(_check(settings, device))
        _print_dispatch(_dispatch(), _suggestions(device))
        return 0
    report = {
        "versions": versions(),
        "environment": _environment(device),
        **asdict(_dispatch()),
        "suggestions": _suggestions(device),
    }
    outcomes = _check(settings, device) if settings.check else []
    if settings.check:
        report["checks"] = [asdict(outcome) for outcome in outcomes]
    print(json.dumps(report, indent=1))
    return _exit_status(outcomes)


def print_environment(device: torch.device) -> None:
    """Print what a bug report should say about the machine, and what training on the device would use."""
    print("\n".join(f"{name:11}{text}" for name, text in _environment(device).items()), end="\n\n", flush=True)


def run_checks(
    devices: Sequence[torch.device], only: Sequence[str], seconds: float, *, printed: bool = True, timed: bool = True
) -> list[self_test.Outcome]:
    """Run the self-test.

    Args:
        devices: Devices whose kernels are checked.
        only: As in `DoctorSettings`.
        seconds: Time limit, after which no check starts.
        printed: Print a table with a row per check, and a summary. The first columns of a row are printed before its
            check starts, so that the last row names a check that hangs or crashes the process.
        timed: Also time the kernels.

    Returns:
        The outcome of each check.

    Raises:
        ValueError: `only` selects no check.
    """
    events: Iterable[self_test.Outcome] = self_test.run(devices, only, seconds, timed=timed)
    if printed:
        events = _printing(events)
    outcomes = [event for event in events if event.status != "running"]
    if not outcomes:
        raise ValueError(
            f"no check contains all words of --only {' '.join(only)}: run without --only to list the checks"
        )
    if printed:
        print("\n" + _verdict(outcomes), flush=True)
    return outcomes


def versions() -> dict[str, str | None]:
    """Return the versions of Python, of the packages that matter here, and of nvcc; None where one is not installed.

    "nvcc" is the compiler that a build would find; "nvcc_of_build" is the one that compiled the native library.
    """
    built = cuda_build.BUILD
    return {
        "python": platform.python_version(),
        **{name: package_version(name) for name in _PACKAGES},
        "nvcc": nvcc_version(),
        "nvcc_of_build": built.nvcc if built is not None else None,
    }


def _check(settings: DoctorSettings, device: torch.device) -> list[self_test.Outcome]:
    devices = [device] if settings.device or device.type == "cpu" else [device, torch.device("cpu")]
    return run_checks(devices, settings.only, settings.seconds or _SECONDS, printed=not settings.json)


def _printing(events: Iterable[self_test.Outcome]) -> Iterator[self_test.Outcome]:
    """Yield the outcomes, and print the row of each as far as it is known."""
    printed = ""  # columns of the current row
    for index, event in enumerate(events):
        if index == 0:
            print(_HEADING)
        columns = _first_columns(event)
        if event.status == "running":
            print(columns, end="", flush=True)
            printed = columns
        else:
            print((columns + _last_columns(event)).removeprefix(printed), flush=True)
            printed = ""
        yield event


def _exit_status(outcomes: Sequence[self_test.Outcome]) -> int:
    return int(any(outcome.status in ("failed", "error") for outcome in outcomes))


def _environment(device: torch.device) -> dict[str, str]:
    """Return the lines of `print_environment` by their names."""
    packages = {name: found for name, found in versions().items() if name not in ("python", "nvcc_of_build")}
    return {
        "versions": ", ".join(f"{name} {found or 'not installed'}" for name, found in packages.items()),
        "commit": commit(),
        "Python": f"{platform.python_version()} on {platform.platform()}",
        "CPU": f"{processor()}; threads: {torch.get_num_threads()}, logical CPUs: {os.cpu_count()}",
        "library": _library(),
        **({} if native.UNAVAILABLE_REASON else {"CUDA C++": cuda_build.summary()}),
        "GPUs": "; ".join(map(_gpu, _gpus())) or "none",
        "driver": f"{driver_version() or 'none'}; torch was built for {_cuda_of_torch()}",
        "fp32 GEMM": _gemm_library(onednn_depth()),
        "training": f"on {device} in {_precision(device)}",
    }


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _gemm_library(depth: int) -> str:
    """Describe which library computes fp32 GEMMs: see `onednn_depth`."""
    if not depth:
        return "MKL on the CPU"
    extent = "" if depth == sys.maxsize else f" up to sums of {depth} terms, else MKL"
    return f"oneDNN (faster on this CPU){extent}"


_HEADING = (
    f"{'operator':21}{'kernels':10}{'precision':10}{'shape':30}{'error':>8}{'allowed':>9}"
    f"{'forward':>10}{'backward':>10}  result"
)


def _first_columns(outcome: self_test.Outcome) -> str:
    return f"{outcome.operator:21}{outcome.implementation:10}{outcome.precision:10}{outcome.shape:30}"


def _last_columns(outcome: self_test.Outcome) -> str:
    """Return what a check found: errors are relative, times in microseconds."""
    columns = [
        " " * width if value is None else f"{value:{width}{form}}"
        for value, width, form in (
            (outcome.error, 8, ".1e"),
            (outcome.allowed, 9, ".1e"),
            (outcome.forward_us, 10, ".0f"),
            (outcome.backward_us, 10, ".0f"),
        )
    ]
    result = outcome.status if outcome.status == "passed" else f"{outcome.status.upper()}: {outcome.message}"
    return "".join(columns) + f"  {result}"


def _verdict(outcomes: Sequence[self_test.Outcome]) -> str:
    """Return a summary: the checks that failed, and in the last line how many passed."""
    count = Counter(outcome.status for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.status in ("failed", "error")]
    lines = []
    if failed:
        lines.append(f"{len(failed)} failed; please report them with all of this output:")
        lines += [f"  {outcome.label}: {outcome.status}: {outcome.message}" for outcome in failed]
    counts = f"{count['passed']} of {len(outcomes)} checks passed, {count['not reached']} were not reached."
    return "\n".join([*lines, counts])


def _suggestions(device: torch.device) -> list[str]:
    """Return what would make this machine faster."""
    found = []
    if native.UNAVAILABLE_REASON is not None:
        found.append("install a C++20 compiler and reinstall bertfast: its native library has the kernels for CPUs")
    if device.type == "cuda":
        if not HAS_TRITON:
            found.append("install Triton, which runs the kernels on GPUs: pip install triton")
        return found
    if torch.get_num_threads() < (os.cpu_count() or 1) // 2:
        threads = f"{torch.get_num_threads()} of {os.cpu_count()}"
        found.append(f"use more threads: OMP_NUM_THREADS or another limit allows {threads}")
    if native.UNAVAILABLE_REASON is None and native.instruction_set() == "plain":
        found.append("use a CPU with AVX2 or AVX-512, for which the kernels are vectorised")
    found.append("use the GPU: --device cuda" if torch.cuda.is_available() else "use a GPU of sm_80 or later")
    return found


def driver_version() -> str:
    """Return the version of NVIDIA's driver, empty if there is none."""
    return output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]


def nvcc_version() -> str | None:
    """Return the version of the nvcc that NVCC, CUDA_HOME or PATH names; None if there is none."""
    home = os.environ.get("CUDA_HOME")
    nvcc = os.environ.get("NVCC") or (str(Path(home, "bin", "nvcc")) if home else "nvcc")
    release = re.search(r"release [\d.]+, V([\d.]+)", output_of(nvcc, "--version"))
    return release and release[1]


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cuda_of_torch() -> str:
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"


def _library() -> str:
    if native.UNAVAILABLE_REASON is not None:
        return f"none: {native.UNAVAILABLE_REASON}"
    sets = ", ".join(native.instruction_sets())
    return f"{native.path()}; instruction sets {sets}; {native.instruction_set()} in use, {_int8_instructions()}"


def _int8_instructions() -> str:
    """Name the instructions that multiply int8; AMX is used with many tokens only."""
    library = torch.ops.bertfast
    names = ["AMX"] * library.has_tiles() + ["VNNI"] * library.has_quad_instruction()
    return f"int8 with {' and '.join(names)}" if names else "int8 without dot products"


def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{device} {properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"


def _precision(device: torch.device) -> str:
    chosen = choose_precision(device)
    if not has_bf16_gemm(device):
        return f"{chosen}: this device has no native bf16 GEMMs"
    is_measured = device.type == "cpu" and native.UNAVAILABLE_REASON is None
    return f"{chosen}: the faster one on this CPU, as measured" if is_measured else chosen


def _dispatch() -> Dispatch:
    columns = {
        f"{device} {name}": torch.empty(0, dtype=dtype, device=device)
        for device in [torch.device("cpu"), *_gpus()]
        for name, dtype in _DTYPES.items()
    }
    reasons = {
        column: unsupported_reason("triton" if x.is_cuda else "cpu", "attention", x) for column, x in columns.items()
    }
    return Dispatch(
        {name: {column: resolve(name, None, x) for column, x in columns.items()} for name in OPERATIONS},
        {column: reason for column, reason in reasons.items() if reason is not None},
        tuple(HEAD_DIMENSIONS),
    )


def _print_dispatch(dispatch: Dispatch, suggestions: list[str]) -> None:
    """Print one line per operator with its implementations, then why the reference runs, then the suggestions."""
    rows = {"operator": list(next(iter(dispatch.operators.values())))}  # the heading
    rows |= {name: list(implementations.values()) for name, implementations in dispatch.operators.items()}
    lines = [f"{name:22}" + "".join(f"{cell:12}" for cell in cells).rstrip() for name, cells in rows.items()]
    dimensions = ", ".join(map(str, dispatch.head_dimensions))
    lines.append(f"attention with a head dimension other than {dimensions}: reference")
    lines += [f"{column}: reference (plain PyTorch): {why}" for column, why in dispatch.fallback_reasons.items()]
    if suggestions:
        lines += ["", "To make it faster:", *(f"  {suggestion}" for suggestion in suggestions)]
    print("\n".join(lines))
