"""Runs every contender of an operation on every case, first against the truth and then against the clock.

    pytest bench/ops --benchmark-json=FILE [--shapes small|main|all]
    pytest bench/ops/attention.py --benchmark-disable    # only against the truth

What is wrong, or cannot run here, is not timed; the JSON says so beside what was. A test of a file takes the fixture
`measure` and calls it.
"""

from __future__ import annotations

import contextlib
import traceback
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from bench.cases import OUR_MASKS, WRONG, calls, checked, extra_memory, measured
from bench.harness import ON_GPU, ceilings, device_seconds, origin, time_limit

collect_ignore = ["conftest.py"]
SHAPES = {"small": ("small",), "main": ("main",), "all": ("main", "rest")}
COMPILED = ("flex", "torch.compile")  # they take seconds to compile, and come last, where a time limit may stop them
NOT_TIMED: list[dict] = []


class Clock:
    """Time as pytest-benchmark is told it: it passes by what was measured on the device, and only so."""

    __name__ = "device_seconds"

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def let_pass(self, seconds: float) -> None:
        self.now += seconds


CLOCK = Clock()


def pytest_addoption(parser):
    parser.addoption(
        "--shapes",
        choices=SHAPES,
        default="all" if ON_GPU else "small",
        help="small: to try the programs, main: what matters most, all (default: all on a GPU, small on a CPU)",
    )

    parser.addoption("--case-seconds", type=int, default=0, help="stop a case after so many seconds (0: never)")


def pytest_configure(config):
    # With the folder, since pytest rewrites the assertions of all that matches: "*.py" would be all of torch.
    config.addinivalue_line("python_files", str(Path(__file__).with_name("*.py")))


def pytest_generate_tests(metafunc):
    module = metafunc.module
    runs = [
        (str(case), provider, direction)
        for shape in SHAPES[metafunc.config.getoption("shapes")]
        for case in module.CASES[shape]
        for provider in module.PROVIDERS
        for direction in case.directions
    ]
    runs.sort(key=lambda run: run[1] in COMPILED)
    metafunc.parametrize(("case", "provider", "direction"), runs)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.excinfo is not None:
        reason = call.excinfo.exconly().removeprefix("Skipped: ").strip().splitlines()[0]
        NOT_TIMED.append({"operation": item.path.stem, **item.callspec.params, "reason": reason})
    return report


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.clear()  # `origin` says what matters


def pytest_benchmark_update_json(output_json):
    output_json |= {"origin": origin(), "ceilings": measured_ceilings(), "not_timed": NOT_TIMED}


@pytest.fixture(scope="session", autouse=True)
def _own_stream():
    # A backward pass runs on its forward's stream, and the default one cannot be captured.
    with torch.cuda.stream(torch.cuda.Stream()) if ON_GPU else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _repeatable_backward():
    # A compiled backward pass would otherwise overwrite what the forward pass saved, and run once only.
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False


@lru_cache(maxsize=1)
def measured_ceilings() -> dict[str, float]:
    """The ceilings of this run."""
    return ceilings()


@pytest.fixture
def measure(request, benchmark, case, provider, direction):
    """A function that checks a contender and times it."""

    def run() -> None:
        try:
            with time_limit(request.config.getoption("--case-seconds")):
                _measure(request.module, benchmark, case, provider, direction)
        except Exception as error:
            if provider == "bertfast":
                raise
            pytest.skip(traceback.format_exception_only(error)[0].strip().splitlines()[0])

    return run


def _measure(module, benchmark, name: str, provider: str, direction: str) -> None:
    case = next(case for cases in module.CASES.values() for case in cases if str(case) == name)
    made, error = checked(module.PROVIDERS[provider], case, provider in OUR_MASKS)
    if not error <= WRONG[case.dtype]:
        outcome = pytest.fail if provider == "bertfast" else pytest.skip
        outcome(f"wrong, so not timed: its relative error is {error:.2g}")
    repeated = calls(case, made, direction)
    if benchmark.disabled:
        benchmark.pedantic(repeated[0])
        return
    samples, clock = device_seconds(repeated)
    floor = case.work(direction).floor(measured_ceilings())
    benchmark.extra_info |= {
        "operation": Path(module.__file__).stem,
        "clock": clock,
        "extra_memory_bytes": extra_memory(case, made),
        **measured(case, provider, direction, samples, floor, error),
    }
    benchmark.group = f"{Path(module.__file__).stem} {name} {direction}"
    remaining = iter(samples)
    benchmark.pedantic(lambda: CLOCK.let_pass(next(remaining)), rounds=len(samples))
