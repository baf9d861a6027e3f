"""Shared parts of the operator benchmarks: cases, implementations, checks against float64 and lower bounds.

A file of `bench/ops` has CASES, lists of sizes by name, and IMPLEMENTATIONS, a factory per implementation that makes
it for a case. Every implementation runs on every case: on a GPU by pytest (`bench/ops/conftest.py`), on a CPU by
`bench.cpu_operators`, which uses the sizes "cpu".
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median, quantiles
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, ON_GPU
from bertfast.cli.self_test import error_and_allowed
from bertfast.ops.dispatch import Implementation as Backend
from bertfast.ops.dropout import Dropout, RngCoordinates
from bertfast.ops.sequences import Sequences

BACKEND: Backend | None = (
    "triton" if ON_GPU else None
)  # on a CPU the default, because the native library lacks some kernels
# Largest relative error, by the Frobenius norm, of a correct result; the error of PyTorch's own sums of 4096 rows in
# bf16 is 0.054.
TOLERANCE = {torch.bfloat16: 0.1, torch.float32: 1e-4}
SAME_MASKS = ("bertfast", "bertfast-cuda", "definition")  # the others draw other dropout masks
EPS = 1e-12  # of LayerNorm in BERT
VOCAB_SIZE = 30522
PREDICTED_TOKENS = 32_768  # of the cases whose times `bench.sass_model` predicts


Output = Tensor | tuple[Tensor, ...]
"""What an implementation returns: one output or several, all of which have a gradient."""


@dataclass(frozen=True)
class Work:
    """The least work of a call.

    Attributes:
        bytes: Traffic to and from memory.
        flops: Floating-point operations of its matmuls.
    """

    bytes: int
    flops: int = 0

    def lower_bound(self, ceilings: dict[str, float]) -> float:
        """Return the seconds that any implementation needs at least."""
        return max(self.bytes / ceilings["bytes"], self.flops / ceilings["flops"])


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A size of an operation. `str(case)` names the size, and dropout and fp32 where they apply."""

    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    directions: ClassVar[tuple[str, ...]] = ("forward", "backward")

    def __str__(self) -> str:
        precision = "-fp32" if self.dtype == torch.float32 else ""
        return self.size + (f"-p{self.dropout}" if self.dropout else "") + precision

    @property
    @abstractmethod
    def size(self) -> str:
        """The name of the size, without spaces."""

    def normal(self, generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        """Return normally distributed values in the precision of the case."""
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(self.dtype)

    @property
    def predicted_case(self) -> str | None:
        """What bench/results/sass_model.md calls the case; None if it is none of those."""
        return None

    @abstractmethod
    def inputs(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Return random inputs of the operation that have a gradient, on DEVICE."""

    @abstractmethod
    def definition(self, *inputs: Any, **options: Any) -> Output:  # so that cases name their inputs
        """Compute the operation by `bertfast.ops.reference`, in the dtype of the inputs."""

    @abstractmethod
    def work(self, direction: str) -> Work:
        """Return the least work of a call in `direction`: each input is read once, each output is written once."""


@dataclass(frozen=True, kw_only=True)
class RowsCase(Case):
    """`rows` tokens of `width` columns."""

    rows: int = 32_768
    width: int = 768

    @property
    def size(self) -> str:
        return f"{self.rows}x{self.width}"

    @property
    def predicted_case(self) -> str | None:
        if self.rows != PREDICTED_TOKENS or self.dtype != torch.bfloat16:
            return None
        return f"{self.width:,} columns" + ", dropout" * bool(self.dropout)


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation.

    Attributes:
        function: The timed function, of its own inputs to its own outputs.
        enter: Converts the inputs of the operation to those of the function, for instance by padding; differentiable
            and not timed.
        leave: Converts the outputs of the function to those of the operation.
        checked: Whether its results are compared with the operation; False if it computes less.
    """

    function: Callable[..., Output]
    enter: Callable[..., Sequence[Tensor]] = lambda *inputs: inputs
    leave: Callable[[Any], Output] = lambda output: output
    checked: bool = True

    def leaves(self, case: Case, seed: int) -> list[Tensor]:
        """Return the inputs of the function, as autograd leaves, for the inputs of the case by `seed`."""
        with torch.no_grad():
            return [x.detach().requires_grad_() for x in self.enter(*case.inputs(_generator(seed)))]


Function = Callable[..., Output]
"""An implementation without conversions: a function of the inputs of the operation."""
Factory = Callable[..., Implementation | Function]
"""Makes an implementation for a case of its operation, and for an option `implementation` if it has one."""


def in_both_precisions(*cases: Case) -> list[Case]:
    """Return each case in fp32 and in bf16."""
    return [replace(case, dtype=dtype) for case in cases for dtype in (torch.float32, torch.bfloat16)]


def dropout_over(sequences: Sequences, p: float, site: str) -> Dropout | None:
    """Return the dropout over all tokens at a site of the first layer, or at the embeddings."""
    rng = RngCoordinates(torch.tensor(1 << 40, device=DEVICE), sequences.token_sequence_ids, sequences.position)
    return rng.dropout(p, site, None if site == "embeddings" else 0)


def packed(rows: int, length: int = 512) -> Sequences:
    """Return sequences of at most `length` tokens with `rows` tokens in total."""
    lengths = [length] * (rows // length) + ([rows % length] if rows % length else [])
    return Sequences.from_lengths(lengths, device=DEVICE)


def make(factory: Factory, case: Case) -> Implementation:
    """Return the implementation that a factory makes for a case."""
    made = factory(case)
    return made if isinstance(made, Implementation) else Implementation(made)


def in_cuda(factory: Factory) -> dict[str, Factory]:
    """Return the CUDA C++ kernels as another implementation; {} without a GPU."""
    return {"bertfast-cuda": partial(factory, implementation="cuda")} if ON_GPU else {}


def definition(case: Case) -> Function:
    """Make the reference implementation."""
    return case.definition


def compiled(factory: Factory) -> Factory:
    """Return a factory of the same implementation under torch.compile."""

    def build(case: Case) -> Implementation:
        require_gpu("torch.compile", "compiling takes longer than the tests may")
        torch.compiler.reset()  # otherwise graphs of other sizes count towards the limit of recompilations
        made = make(factory, case)
        return replace(made, function=torch.compile(made.function, dynamic=False, fullgraph=True))

    return build


def liger() -> ModuleType:
    """Return Liger's functions; skip the benchmark if they are not available."""
    require_gpu("Liger", "its kernels are written in Triton")
    module: ModuleType = pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)
    return module


def require_gpu(name: str, reason: str) -> None:
    """Skip the benchmark without a GPU, for the given reason."""
    if not ON_GPU:
        pytest.skip(f"{name} is timed on a GPU only: {reason}")


@lru_cache(maxsize=1)  # both directions of a case follow one another
def checked(factory: Factory, case: Case, name: str) -> tuple[Implementation, float, str | None]:
    """Make an implementation of a case and compare it with float64, without dropout if it draws other masks.

    Returns:
        The implementation, its largest relative error, and why it is not to be timed; None if its results are right.
    """
    made = make(factory, case)
    if not made.checked:
        return made, 0.0, None
    compared, of_compared = case, made
    if case.dropout and name not in SAME_MASKS:
        compared = replace(case, dropout=0.0)
        of_compared = make(factory, compared)
    errors = _relative_errors(compared, _results(compared, of_compared))
    limits = allowed_errors(compared, name)
    wrong = [(error, limit) for error, limit in zip(errors, limits, strict=True) if not error <= limit]
    reason = "not timed because its results are wrong: the relative error is {:.2g}, allowed is {:.2g}"
    # A tensor, because its maximum is NaN if an error is.
    return made, float(torch.tensor(errors).max()), reason.format(*wrong[0]) if wrong else None


def allowed_errors(case: Case, name: str) -> list[float]:
    """Return the largest relative errors of the outputs and gradients of an implementation.

    In bf16, bertfast's must not be larger than the accuracy rule of the tests allows, which compares them with those
    of PyTorch.
    """
    expected = _expected(case)
    limits = [TOLERANCE[case.dtype]] * len(expected)
    if case.dtype != torch.bfloat16 or not name.startswith("bertfast"):
        return limits
    rule = [
        error_and_allowed(found, found, true, case.dtype)[1] / float(true.norm())
        for found, true in zip(_baseline(case), expected, strict=True)
    ]
    return [min(pair) for pair in zip(limits, rule, strict=True)]


def measured(
    case: Case, name: str, direction: str, samples: list[float], lower_bound: float, error: float
) -> dict[str, object]:
    """Return the entry of an implementation in a result file; `samples` are seconds per call."""
    work, (p20, *_, p80) = case.work(direction), quantiles(samples, n=5)
    return {
        "case": str(case),
        "implementation": name,
        "direction": direction,
        "relative_error": error,
        "p20_s": p20,
        "p80_s": p80,
        "bytes": work.bytes,
        "flops": work.flops,
        "lower_bound_s": lower_bound,
        "roofline_efficiency": lower_bound / median(samples),
    }


def _relative_errors(case: Case, results: Sequence[Tensor | None]) -> list[float]:
    """Return the errors of outputs and gradients relative to the norms of the float64 results; 0 for absent ones."""
    return [
        0.0 if result is None else float((result.detach().double() - expected).norm() / expected.norm())
        for result, expected in zip(results, _expected(case), strict=True)
    ]


def _results(case: Case, implementation: Implementation) -> list[Tensor | None]:
    """Return the outputs, and the gradients of the inputs of the operation."""
    inputs = [x.requires_grad_() for x in case.inputs(_generator(0))]
    outputs = _outputs(implementation.leave(implementation.function(*implementation.enter(*inputs))))
    return [*outputs, *torch.autograd.grad(outputs, inputs, _output_gradients(outputs), allow_unused=True)]


@lru_cache(maxsize=2)  # a case with dropout and the same case without
def _expected(case: Case) -> list[Tensor]:
    return _definition(case, torch.float64)


@lru_cache(maxsize=2)
def _baseline(case: Case) -> list[Tensor]:
    return _definition(case)


def _definition(case: Case, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return the outputs and gradients of the reference, with all inputs in a dtype; None: with those of the case."""
    inputs = [x.to(dtype or x.dtype).requires_grad_() for x in case.inputs(_generator(0))]
    outputs = _outputs(case.definition(*inputs))
    gradients = torch.autograd.grad(outputs, inputs, _output_gradients(outputs))
    return [*(output.detach() for output in outputs), *gradients]


def calls(case: Case, implementation: Implementation, direction: str) -> list[Callable[[], object]]:
    """Return calls on different inputs, together four times the size of the L2 cache.

    "forward" records for a backward pass, as in training, and "backward" is the backward pass alone; "inference" is a
    forward pass that records nothing, and "training" is both passes.
    """
    leaves = implementation.leaves(case, 0)
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 0
    sets = max(math.ceil(4 * cache / sum(x.nbytes for x in leaves)), 2)
    return [
        _call(implementation.function, leaves if seed == 0 else implementation.leaves(case, seed), direction)
        for seed in range(sets)
    ]


def _call(function: Function, leaves: list[Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":
        # What was saved for a backward pass is released.
        return lambda: tuple(output.detach() for output in _outputs(function(*leaves)))
    if direction == "inference":
        return torch.no_grad()(lambda: function(*leaves))
    if direction == "training":  # of a loss
        return lambda: torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    outputs = _outputs(function(*leaves))
    if not any(output.requires_grad for output in outputs):
        pytest.skip("it has no gradient")
    d_outputs = _output_gradients(outputs)
    return lambda: torch.autograd.grad(outputs, leaves, d_outputs, retain_graph=True, allow_unused=True)


def extra_memory(case: Case, implementation: Implementation) -> int | None:
    """Return the peak bytes of both passes beyond the inputs and all gradients; None on a CPU, or without gradients."""
    if not ON_GPU:
        return None
    leaves = implementation.leaves(case, 0)
    outputs = _outputs(implementation.function(*leaves))
    if not any(output.requires_grad for output in outputs):
        return None
    d_outputs = _output_gradients([output.detach() for output in outputs])
    del outputs  # with what is saved for a backward pass
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(_outputs(implementation.function(*leaves)), leaves, d_outputs, allow_unused=True)
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients if x is not None)


def _outputs(output: Output) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _output_gradients(outputs: Sequence[Tensor]) -> list[Tensor]:
    # 1 for a loss; otherwise random values, the same for all implementations, that bf16 represents exactly.
    return [
        torch.randn(output.shape, generator=_generator(seed), device=DEVICE).bfloat16().to(output.dtype)
        if output.dim()
        else torch.ones_like(output)
        for seed, output in enumerate(outputs, 1)
    ]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)
