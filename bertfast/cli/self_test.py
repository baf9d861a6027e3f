"""Check every kernel that runs on a device against a float64 reference, forward and backward, at BERT's shapes.

`bertfast doctor --check` prints the outcomes. The rule is that of the tests: the Frobenius norm of the error of an
output or gradient is at most twice that of the reference in the same precision, plus a few ulps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from bertfast.cli.self_test_problems import Problem, problems
from bertfast.ops.dispatch import Implementation, unsupported_reason
from bertfast.runtime.precision import wait_for

ULPS = 8
# Precision: dtypes of the first input (an activation) and of all others; the most used first. The row-wise operators
# get the mixed one under autocast.
PRECISIONS = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "bf16+fp32": (torch.bfloat16, torch.float32),
    "fp16": (torch.float16, torch.float16),
}
ROW_WISE = ("add_layer_norm", "bias_gelu", "gated_activation", "gelu_layer_norm", "pre_norm")
# Largest relative error of the reference, which is the baseline of all others: what rounding alone can cause. A bf16
# sum over thousands of rows can be off by 5 %.
REFERENCE_LIMIT = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}
# fp32 attention in Triton multiplies three TF32 parts per operand (tf32x3): about as accurate as fp32, but tensor cores
# truncate where fp32 rounds, so at D = 128 the error is close to twice that of PyTorch.
TF32X3_FACTOR = 4
REPEATS = {"cuda": 5, "cpu": 2}


@dataclass(frozen=True)
class Outcome:
    """The outcome of one check.

    Attributes:
        operator, implementation, precision, shape, device: What was checked.
        status: "passed", "failed" (the error is too large), "error" (an exception), "not reached", or "running" (the
            check starts now, and another outcome follows).
        error, allowed: Error and largest allowed error of the tensor with the largest ratio of the two, relative to the
            norm of its true value; None if nothing was compared.
        forward_us, backward_us: Median wall time of a call in microseconds, launch included; None if not measured.
        message: The tensor with the largest ratio, the exception, or why the check was not reached.
    """

    operator: str
    implementation: str
    precision: str
    shape: str
    device: str
    status: str
    error: float | None = None
    allowed: float | None = None
    forward_us: float | None = None
    backward_us: float | None = None
    message: str = ""

    @property
    def label(self) -> str:
        """Return what was checked, in one line."""
        return f"{self.operator} {self.implementation} {self.precision} {self.shape} on {self.device}"


@dataclass(frozen=True)
class _Check:
    problem: Problem
    implementation: Implementation
    precision: str
    device: torch.device

    @property
    def words(self) -> set[str]:
        """Return the words by which `--only` selects it: those of its line, and no-dropout if it has no dropout."""
        problem = self.problem
        words = {problem.operator, self.implementation, self.precision, *problem.shape.split()}
        return words if "dropout" in words else words | {"no-dropout"}

    def outcome(self, status: str, **values: Any) -> Outcome:
        problem = self.problem
        return Outcome(
            problem.operator, self.implementation, self.precision, problem.shape, str(self.device), status, **values
        )


def error_and_allowed(
    found: Tensor,
    baseline: Tensor,
    truth: Tensor,
    dtype: torch.dtype,
    neighbour: Tensor | None = None,
    factor: float = 2,
) -> tuple[float, float]:
    """Return the Frobenius error of `found` and the largest that the accuracy rule allows.

    Args:
        found: The result to judge.
        baseline: PyTorch's own result in `dtype`, same shape.
        truth: float64, same shape.
        dtype: The dtype whose ulps are taken.
        neighbour: If the reference cancels to 0, one of the tensors that it is the difference of: its norm scales
            the ulps.
        factor: Allowed multiple of the baseline's error.
    """
    truth = truth.detach().double()
    error, baseline_error = ((x.detach().double() - truth).norm() for x in (found, baseline))
    largest = truth.abs().max() if neighbour is None else neighbour.detach().double().norm()
    return float(error), float(factor * baseline_error + ULPS * torch.finfo(dtype).eps * largest)


def run(
    devices: Sequence[torch.device], only: Sequence[str], budget: float, *, timed: bool = True
) -> Iterator[Outcome]:
    """Yield the outcome of each check, the most informative first; those beyond the time limit come last.

    Before a check starts, an outcome with the status "running" is yielded.

    Args:
        devices: Devices whose kernels are checked, one after the other.
        only: Words that a check's line must all contain ("triton", "D=64", …); empty: all checks.
        budget: Time limit in seconds: no check starts that is expected to end later.
        timed: Whether the kernels are also timed.
    """
    started, longest = time.monotonic(), 0.0
    stopped = ""
    for device in devices:
        for group in [*_groups(device, only)]:  # a list: after a CUDA error, the GPU cannot be queried any more
            left = budget - (time.monotonic() - started)
            if not stopped and left < longest:
                stopped = f"the time limit of {budget:.0f} s is over"
            if stopped:
                yield from (check.outcome("not reached", message=stopped) for check in group)
                continue
            before = time.monotonic()
            for outcome in _run_group(group, timed):
                yield outcome
                if outcome.status == "error" and _is_poisoned(device):
                    stopped = "an earlier CUDA error made the GPU unusable for this process; run it in a new process"
            longest = max(longest, time.monotonic() - before)


def _is_poisoned(device: torch.device) -> bool:
    """Return whether an earlier CUDA error makes every call on the device fail."""
    if device.type != "cuda":
        return False
    try:
        wait_for(device)
    except RuntimeError:
        return True
    return False


def _groups(device: torch.device, only: Sequence[str]) -> Iterator[list[_Check]]:
    """Yield groups of checks with the same reference and baseline: one problem and precision, every implementation."""
    all_problems = problems(device)
    for precision, (dtype, _) in PRECISIONS.items():
        for problem in all_problems:
            if precision == "bf16+fp32" and problem.operator not in ROW_WISE:
                continue
            x = torch.empty(0, dtype=dtype, device=device)
            group = [
                _Check(problem, implementation, precision, device)
                for implementation in get_args(Implementation)
                if _is_available(implementation, problem.operator, x)
            ]
            selected = [check for check in group if set(only) <= check.words]
            if selected:
                yield selected


def _is_available(implementation: Implementation, operator: str, x: Tensor) -> bool:
    # linear_gelu is a GEMM followed by the kernel of bias_gelu.
    return unsupported_reason(implementation, "bias_gelu" if operator == "linear_gelu" else operator, x) is None


def _run_group(group: list[_Check], timed: bool) -> Iterator[Outcome]:
    problem, precision, device = group[0].problem, group[0].precision, group[0].device
    first, others = PRECISIONS[precision]
    yield group[0].outcome("running")  # the reference, which all of them need, is part of the first check
    try:
        inputs = [x.to(others if index else first) for index, x in enumerate(problem.inputs)]
        truth = _results(problem, "reference", [x.double() for x in inputs])
        baseline = _results(problem, "reference", inputs)
    except Exception as error:
        yield from (check.outcome("error", message=f"in the reference: {_one_line(error)}") for check in group)
        return
    for index, check in enumerate(group):
        if index > 0:
            yield check.outcome("running")
        try:
            yield _compared(check, inputs, baseline, truth, timed)
        except Exception as error:
            yield check.outcome("error", message=_one_line(error))
            if _is_poisoned(device):
                yield from (
                    rest.outcome("not reached", message="an earlier CUDA error made the GPU unusable")
                    for rest in group[index + 1 :]
                )
                return


def _results(problem: Problem, implementation: Implementation, inputs: list[Tensor]) -> list[Tensor]:
    """Return the outputs, and the gradient of each input for fixed random gradients of the outputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = _outputs(problem, implementation, leaves)
    gradients = torch.autograd.grad(outputs, leaves, [*map(_output_gradient, outputs)])
    return [*(output.detach() for output in outputs), *gradients]


def _outputs(problem: Problem, implementation: Implementation, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    output = problem.call(implementation, *inputs)
    return output if isinstance(output, tuple) else (output,)


def _output_gradient(output: Tensor) -> Tensor:
    if output.dim() == 0:
        return torch.ones_like(output)
    # Values that every dtype represents exactly, so that all precisions differentiate the same sum.
    generator = torch.Generator().manual_seed(1)
    return (torch.randint(-8, 9, output.shape, generator=generator) / 8).to(output.device, output.dtype)


def _compared(check: _Check, inputs: list[Tensor], baseline: list[Tensor], truth: list[Tensor], timed: bool) -> Outcome:
    problem, lowest = check.problem, inputs[0].dtype
    is_reference = check.implementation == "reference"
    found = baseline if is_reference else _results(problem, check.implementation, inputs)
    tf32 = check.implementation == "triton" and check.device.type == "cuda" and lowest == torch.float32
    factor = TF32X3_FACTOR if tf32 and problem.operator == "attention" else 2
    compared: list[tuple[float, str, float, float]] = []
    outputs = ("output", "second output")[: len(truth) - len(problem.shapes)]
    names = (*outputs, *(f"gradient of {name}" for name in problem.shapes))
    for name, result, expected, true in zip(names, found, baseline, truth, strict=True):
        # The copy for the next GEMM may have a lower precision than the inputs.
        dtype = max(lowest, expected.dtype, key=lambda each: torch.finfo(each).eps)
        error, allowed = error_and_allowed(result, expected, true, dtype, factor=factor)
        norm = float(true.norm())
        if is_reference:
            allowed = REFERENCE_LIMIT[dtype] * norm
        excess = error / allowed if error == error else float("inf")  # NaN exceeds every limit
        compared.append((excess, name, error / norm, allowed / norm))
    excess, name, error, allowed = max(compared, key=lambda each: each[0])
    forward, backward = _times(check, inputs) if timed else (None, None)
    return check.outcome(
        "passed" if excess <= 1 else "failed",
        error=error,
        allowed=allowed,
        forward_us=forward,
        backward_us=backward,
        message=name,
    )


def _times(check: _Check, inputs: list[Tensor]) -> tuple[float, float]:
    """Return the median times of a forward and a backward pass in microseconds; all kernels are compiled by now."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    gradients, samples = None, []
    for _ in range(REPEATS.get(check.device.type, 1) if check.implementation != "reference" else 1):
        wait_for(check.device)
        started = time.perf_counter()
        outputs = _outputs(check.problem, check.implementation, leaves)
        wait_for(check.device)
        between = time.perf_counter()
        gradients = [*map(_output_gradient, outputs)] if gradients is None else gradients
        wait_for(check.device)
        resumed = time.perf_counter()
        torch.autograd.grad(outputs, leaves, gradients)
        wait_for(check.device)
        samples.append((between - started, time.perf_counter() - resumed))
    return tuple(1e6 * statistics.median(column) for column in zip(*samples, strict=True))


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
