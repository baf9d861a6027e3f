"""Check every implementation of an operation on every case against float64, then time it.

    pytest bench/ops --benchmark-json=FILE [--shapes small|main|predicted|all]
    pytest bench/ops/attention.py --benchmark-disable    # only the check

Implementations that are wrong or cannot run are not timed; the JSON file lists them with the reason. It is written
after each result, so that a kernel that hangs or ends its process does not take the results before it. Each other file
has a test that takes the fixture `measure` and calls it.
"""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Callable, Generator, Iterator
from functools import cache
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import pytest
import torch

from bench.cases import calls, checked, extra_memory, measured
from bench.ceilings import ceilings
from bench.harness import ON_GPU, compile_backward_with_forward, device_seconds, time_limit
from bench.kernel_times import kernel_times
from bench.result_files import origin, require_clean_tree
from bertfast.runtime.atomic_write import write_atomically

collect_ignore = ["conftest.py"]
SHAPES = {
    "small": ("small",),
    "main": ("main",),
    "predicted": ("main", "predicted"),
    "all": ("main", "predicted", "rest"),
}
COMPILED = ("flex", "torch.compile")  # they compile for seconds, and a time limit may stop them
RESULT: dict[str, Any] = {"benchmarks": [], "kernels": [], "not_timed": []}  # what the JSON file has, with the origin


class Clock:
    """A clock for pytest-benchmark that advances only by the seconds that were measured on the device."""

    __name__ = "device_seconds"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shapes",
        choices=SHAPES,
        default="all" if ON_GPU else "small",
        help="small: to try the programs, main: the most important sizes, predicted: these and further ones of "
        "bench/results/sass_model.md, all (default: all on a GPU, small on a CPU)",
    )
    parser.addoption("--case-seconds", type=int, default=0, help="time limit of a case in seconds (0: none)")
    parser.addoption("--ceilings", type=Path, help="result file of bench.ceilings (default: they are measured again)")
    help_text = "on a GPU, time the kernels of each call one by one, instead of the call"
    parser.addoption("--kernels", action="store_true", help=help_text)


def pytest_configure(config: pytest.Config) -> None:
    if (file := json_file(config)) is not None:
        require_clean_tree(file)
        measured_origin()  # now, because the GPU may be unusable when the first result is written
    # With the folder, because pytest rewrites the assertions of all matching files; "*.py" would match all of torch.
    config.addinivalue_line("python_files", str(Path(__file__).with_name("*.py")))


def json_file(config: pytest.Config) -> Path | None:
    """Return the path after --benchmark-json, which older versions of pytest-benchmark open; None if there is none."""
    given = config.getoption("benchmark_json", None)
    return given if given is None or isinstance(given, Path) else Path(given.name)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module
    runs = [
        (str(case), implementation, direction)
        for shape in SHAPES[metafunc.config.getoption("shapes")]
        for case in module.CASES.get(shape, [])
        for implementation in module.IMPLEMENTATIONS
        for direction in case.directions
    ]
    metafunc.parametrize(("case", "implementation", "direction"), runs)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Order the runs: those of bertfast, which a time limit must not drop, before others, and compiled ones last."""
    items.sort(key=lambda item: _turn(str(item.callspec.params["implementation"])))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


def _turn(implementation: str) -> int:
    return 2 if implementation in COMPILED else int(not implementation.startswith("bertfast"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Function, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.excinfo is not None:
        reason = call.excinfo.exconly().removeprefix("Skipped: ").strip().splitlines()[0]
        RESULT["not_timed"].append({"operation": item.path.stem, **item.callspec.params, "reason": reason})
        save(item.config)
    return report


def save(config: pytest.Config) -> None:
    """Write all results so far to the JSON file."""
    if (file := json_file(config)) is not None:
        write_atomically(file, json.dumps({"origin": measured_origin(), **RESULT}, indent=1) + "\n")


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # `origin` describes the machine


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Have pytest-benchmark write at the end what the file has already."""
    output_json.clear()
    output_json |= {"origin": measured_origin(), **RESULT}


@pytest.fixture(scope="session", autouse=True)
def _own_stream() -> Iterator[None]:
    # A backward pass runs on the stream of its forward pass, and the default stream cannot be captured.
    with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _compilation() -> None:
    # Otherwise a compiled backward pass overwrites what the forward pass saved, and runs only once.
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    compile_backward_with_forward()


@cache
def measured_origin() -> dict[str, Any]:
    """Return the origin of all results of this run."""
    return origin()


@cache
def measured_ceilings(file: Path | None) -> dict[str, float]:
    """Return the ceilings, from a result file of `bench.ceilings` or measured once per run, and add them to RESULT."""
    if file is not None and file.exists():
        found: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["ceilings"]
    else:
        found = ceilings()
    RESULT["ceilings"] = found
    return found


@pytest.fixture
def measure(
    request: pytest.FixtureRequest, benchmark: Any, case: str, implementation: str, direction: str
) -> Callable[[], None]:
    """Return a function that checks and times an implementation."""

    def run() -> None:
        try:
            with time_limit(request.config.getoption("--case-seconds")):
                _measure(request.module, request.config, case, implementation, direction, benchmark)
        except Exception as error:
            if implementation.startswith("bertfast") and not _is_unavailable(error, implementation):
                raise
            pytest.skip(traceback.format_exception_only(error)[0].strip().splitlines()[0])

    return run


def _is_unavailable(error: Exception, implementation: str) -> bool:
    """Return whether an alternative to bertfast's default kernels is not available on this machine."""
    return implementation != "bertfast" and isinstance(error, ValueError) and " is not available: " in str(error)


def _measure(
    module: ModuleType, config: pytest.Config, name: str, implementation: str, direction: str, benchmark: Any
) -> None:
    case = next(case for cases in module.CASES.values() for case in cases if str(case) == name)
    made, error, wrong = checked(module.IMPLEMENTATIONS[implementation], case, implementation)
    if wrong:
        (pytest.fail if implementation.startswith("bertfast") else pytest.skip)(wrong)
    where = {"operation": module.__name__.rpartition(".")[2], "case": name}
    where |= {"implementation": implementation, "direction": direction}
    repeated = calls(case, made, direction)
    if config.getoption("kernels") and ON_GPU:
        times = {"predicted_case": case.predicted_case, "kernels": kernel_times(repeated)}
        RESULT["kernels"].append({**where, **times})
        save(config)
    if config.getoption("kernels") or benchmark.disabled:
        benchmark.pedantic(repeated[0])
        return
    samples, clock = device_seconds(repeated)
    lower_bound = case.work(direction).lower_bound(measured_ceilings(config.getoption("--ceilings")))
    info = {
        **where,
        "clock": clock,
        "extra_memory_bytes": extra_memory(case, made),
        **measured(case, implementation, direction, samples, lower_bound, error),
    }
    RESULT["benchmarks"].append({"extra_info": info, "stats": {"median": median(samples), "data": samples}})
    save(config)
    benchmark.group = f"{where['operation']} {name} {direction}"
    remaining = iter(samples)
    benchmark.pedantic(lambda: CLOCK.advance(next(remaining)), rounds=len(samples))
