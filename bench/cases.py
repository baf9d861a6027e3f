"""What the benchmarks of single operations share: cases, contenders, what is right, and what a call must cost at least.

A file of `bench/ops` has CASES, its sizes, and PROVIDERS, who makes a contender for a case. Every contender runs on
every case: on a GPU by the folder's `conftest.py`, on a CPU by `cpu_kernels.py`, which has sizes of its own ("cpu").
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from statistics import median, quantiles
from types import ModuleType
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bench.harness import DEVICE, ON_GPU
from bertfast.ops.dropout import Dropout, RngCoordinates
from bertfast.ops.sequences import Sequences

OURS = "triton" if ON_GPU else None  # on a CPU what is chosen there: the compiled library has no kernel of some
# Relative error, by the Frobenius norm, above which a result is no rounding any more; PyTorch's own sums of 4096 rows
# in bf16 err by 0.054.
WRONG = {torch.bfloat16: 0.1, torch.float32: 1e-4}
OUR_MASKS = ("bertfast", "bertfast-cuda", "definition")  # the others draw dropout's masks in their own way
EPS = 1e-12  # of LayerNorm, as BERT has it
VOCABULARY = 30522


@dataclass(frozen=True)
class Work:
    """What a call does at least: `bytes` to and from memory, and the `flops` of its products."""

    bytes: int
    flops: int = 0

    def floor(self, ceilings: dict[str, float]) -> float:
        """Seconds that no implementation can beat."""
        return max(self.bytes / ceilings["bytes"], self.flops / ceilings["flops"])


@dataclass(frozen=True, kw_only=True)
class Case(ABC):
    """A size of an operation. `str(case)` is its name: that of the size, and what is not usual on a GPU."""

    dropout: float = 0.0
    dtype: torch.dtype = torch.bfloat16
    directions: ClassVar = ("forward", "backward")

    def __str__(self) -> str:
        precision = "-fp32" if self.dtype == torch.float32 else ""
        return self.size + (f"-p{self.dropout}" if self.dropout else "") + precision

    @property
    @abstractmethod
    def size(self) -> str:
        """The size alone, in a word."""

    def normal(self, generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
        """Normally distributed numbers in the case's precision."""
        return (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(self.dtype)

    @abstractmethod
    def inputs(self, generator: torch.Generator) -> Sequence[Tensor]:
        """Random tensors that the operation reads and has a gradient for, on DEVICE."""

    @abstractmethod
    def definition(self, *inputs: Tensor) -> Tensor:
        """The operation by `bertfast.ops.reference`, in whatever dtype the inputs have."""

    @abstractmethod
    def work(self, direction: str) -> Work:
        """The least that a call in `direction` does: each input read once, each output written once."""


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    Attributes:
        function: what is timed: of its own leaves to its own output.
        enter: the operation's inputs as those leaves (padded, say); differentiable, not timed.
        leave: the function's output as the operation's.
        checked: against the operation; one that computes less is there for scale.
    """

    function: Callable[..., Tensor]
    enter: Callable[..., Sequence[Tensor]] = lambda *inputs: inputs
    leave: Callable[[Tensor], Tensor] = lambda output: output
    checked: bool = True

    def leaves(self, case: Case, seed: int) -> list[Tensor]:
        """Leaves of the function for the case's inputs by `seed`."""
        with torch.no_grad():
            return [x.detach().requires_grad_() for x in self.enter(*case.inputs(_generator(seed)))]


def in_both_precisions(*cases: Case) -> list[Case]:
    """Each case in fp32 and in bf16."""
    return [replace(case, dtype=dtype) for case in cases for dtype in (torch.float32, torch.bfloat16)]


def dropout_over(sequences: Sequences, p: float, site: str) -> Dropout | None:
    """The dropout at a site of the model's first layer, or outside the layers, over all tokens."""
    rng = RngCoordinates(torch.tensor(1 << 40, device=DEVICE), sequences.token_sequence_ids, sequences.position)
    return rng.dropout(p, site, None if site == "embeddings" else 0)


def packed(rows: int) -> Sequences:
    """Sequences of up to 512 tokens that hold `rows` in all."""
    lengths = [512] * (rows // 512) + ([rows % 512] if rows % 512 else [])
    return Sequences.from_lengths(lengths, device=DEVICE)


Provider = Callable[[Case], Contender | Callable[..., Tensor]]
"""How a contender is made for a case; a plain function of the operation's inputs is one too."""


def contender(provider: Provider, case: Case) -> Contender:
    """The contender that a provider makes for a case."""
    made = provider(case)
    return made if isinstance(made, Contender) else Contender(made)


def in_cuda(ours: Provider) -> dict[str, Provider]:
    """Our kernels in CUDA C++ as a contender too, on a GPU."""
    return {"bertfast-cuda": partial(ours, implementation="cuda")} if ON_GPU else {}


def definition(case: Case) -> Callable[..., Tensor]:
    """The provider that is the definition itself."""
    return case.definition


def compiled(provider: Provider) -> Provider:
    """The same compiled by PyTorch."""

    def build(case: Case) -> Contender:
        needs_gpu("what torch.compile makes")  # for a CPU it compiles longer than continuous integration has
        torch.compiler.reset()  # or what was compiled for other sizes counts against the limit
        made = contender(provider, case)
        return replace(made, function=torch.compile(made.function, dynamic=False, fullgraph=True))

    return build


def liger() -> ModuleType:
    """Liger's functions, if they are here."""
    needs_gpu("Liger")
    return pytest.importorskip("liger_kernel.transformers.functional", exc_type=ImportError)


def needs_gpu(what: str) -> None:
    """Skip what is for a GPU only where there is none."""
    if not ON_GPU:
        pytest.skip(f"{what} is timed on a GPU only")


@lru_cache(maxsize=1)  # both directions follow one another
def checked(provider: Provider, case: Case, our_masks: bool) -> tuple[Contender, float]:
    """The contender and its relative error; of one with masks of its own, without dropout."""
    made = contender(provider, case)
    if not made.checked:
        return made, 0.0
    if our_masks or not case.dropout:
        return made, relative_error(case, made)
    dropless = replace(case, dropout=0.0)
    return made, relative_error(dropless, contender(provider, dropless))


def measured(case: Case, name: str, direction: str, samples: list[float], floor: float, error: float) -> dict:
    """What a result says of a contender: its `samples` are seconds of a call, `floor` the least of them."""
    work, (p20, *_, p80) = case.work(direction), quantiles(samples, n=5)
    return {
        "case": str(case),
        "provider": name,
        "direction": direction,
        "relative_error": error,
        "p20_s": p20,
        "p80_s": p80,
        "bytes": work.bytes,
        "flops": work.flops,
        "floor_s": floor,
        "share_of_floor": floor / median(samples),
    }


def relative_error(case: Case, contender: Contender) -> float:
    """The largest error of output and gradients against float64, as a share of the true norm; NaN if there is one."""
    inputs = [x.requires_grad_() for x in case.inputs(_generator(0))]
    output = contender.leave(contender.function(*contender.enter(*inputs)))
    gradients = torch.autograd.grad(output, inputs, _output_gradient(output), allow_unused=True)
    errors = [
        (result.detach().double() - true).norm() / true.norm()
        for result, true in zip([output, *gradients], _truth(case), strict=True)
        if result is not None
    ]
    return float(torch.stack(errors).max())


@lru_cache(maxsize=2)  # a case with dropout, and the one without
def _truth(case: Case) -> list[Tensor]:
    inputs = [x.double().requires_grad_() for x in case.inputs(_generator(0))]
    output = case.definition(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, _output_gradient(output))]


def calls(case: Case, contender: Contender, direction: str) -> list[Callable[[], object]]:
    """Calls that compute the same on inputs of their own, together four times what the second-level cache holds.

    "forward" records for a backward pass, as in training, and "backward" is that pass alone; "inference" is a forward
    pass that records nothing, and "training" both passes in one.
    """
    leaves = contender.leaves(case, 0)
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size if ON_GPU else 0
    sets = max(math.ceil(4 * cache / sum(x.nbytes for x in leaves)), 2)
    return [
        _call(contender.function, leaves if seed == 0 else contender.leaves(case, seed), direction)
        for seed in range(sets)
    ]


def _call(function: Callable[..., Tensor], leaves: list[Tensor], direction: str) -> Callable[[], object]:
    if direction == "forward":
        return lambda: function(*leaves).detach()  # what was saved for a backward pass is not held
    if direction == "inference":
        return torch.no_grad()(lambda: function(*leaves))
    if direction == "training":  # of a loss
        return lambda: torch.autograd.grad(function(*leaves), leaves, allow_unused=True)
    output = function(*leaves)
    if not output.requires_grad:
        pytest.skip("it has no gradient")
    d_output = _output_gradient(output)
    return lambda: torch.autograd.grad(output, leaves, d_output, retain_graph=True, allow_unused=True)


def extra_memory(case: Case, contender: Contender) -> int | None:
    """Bytes at the peak of a forward and a backward pass, beyond the inputs and all gradients; None on a CPU."""
    if not ON_GPU:
        return None
    leaves = contender.leaves(case, 0)
    d_output = _output_gradient(contender.function(*leaves).detach())
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(contender.function(*leaves), leaves, d_output, allow_unused=True)
    return torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in gradients if x is not None)


def _output_gradient(output: Tensor) -> Tensor:
    # Of a loss 1; else random numbers, the same for all contenders, that bf16 holds.
    if output.dim() == 0:
        return torch.ones_like(output)
    return torch.randn(output.shape, generator=_generator(1), device=DEVICE).bfloat16().to(output.dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)
