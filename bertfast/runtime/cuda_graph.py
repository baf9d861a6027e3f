"""CUDA graphs: functions of a batch, captured once for each shape and replayed: one launch instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import unsupported_reason
from bertfast.runtime.precision import half

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Captures what a function launches; returns the tensor in which its result will lie, and what replays it all."""

WARMUP_CALLS = 3  # calls before a capture, in which kernels are compiled and libraries allocate their workspaces
MAX_GRAPHS = 16  # of one runner; they share their memory, but each keeps its batch and its nodes


class StaticBatch(Protocol):
    """What a runner asks of a batch."""

    def to(self, device: torch.device, non_blocking: bool = False) -> StaticBatch:
        """Return the batch on a device, which is not waited for."""

    def tensors(self) -> list[Tensor]:
        """Return all of its tensors, in the same order for all batches."""

    def options(self) -> Hashable:
        """Return what else, besides the tensors' shapes, decides which operations run."""


class ModelConfig(Protocol):
    """The sizes that decide it."""

    hidden_size: int
    num_attention_heads: int


class CapturableModel(Protocol):
    """What decides whether a model's passes can be captured."""

    config: ModelConfig
    device: torch.device

    def modules(self) -> Iterator[nn.Module]:
        """Return the modules that it is made of."""


def cuda_graph(function: Callable[[], Tensor], pool) -> tuple[Tensor, Callable[[], None]]:
    """Capture `function` on the current stream, which must not be the default one. Capturing does not run it."""
    graph = torch.cuda.CUDAGraph()
    # A thread that pins batches meanwhile may allocate.
    with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


def cuda_graphs() -> Capture:
    """Return what captures CUDA graphs that share one memory pool.

    Replays must not overlap, and what one returns is to be read, or copied, before another is replayed.
    """
    return partial(cuda_graph, pool=torch.cuda.graph_pool_handle())


def can_capture(config: ModelConfig, precision: str, device: torch.device) -> bool:
    """Return whether a model's passes can be captured: on a GPU with kernels for its attention.

    Plain PyTorch's takes too much memory to keep for a graph.
    """
    if device.type != "cuda" or config.hidden_size // config.num_attention_heads not in HEAD_DIMENSIONS:
        return False
    return unsupported_reason("triton", "attention", torch.empty(0, dtype=half(precision), device=device)) is None


def capture_for(model: CapturableModel, precision: str, *, enabled: bool) -> Capture | None:
    """Return what captures a model's passes, or None where they run eagerly."""
    # An LSTM needs the sequences' lengths on the host, and waits for the device.
    waits = any(isinstance(module, nn.LSTM) for module in model.modules())
    if not enabled or waits or not can_capture(model.config, precision, model.device):
        return None
    return cuda_graphs()


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of a GPU that can be captured; the default one cannot."""
    if device.type != "cuda":
        yield
        return
    stream, default = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


class GraphRunner:
    """A function of a batch, or of nothing, captured after a few calls for each shape and replayed from then on.

    A shape that is seen too rarely, or once `max_graphs` shapes are captured, runs eagerly.

    Args:
        function: Reads of the batch only what is on the device, and returns a tensor; that of a replay is overwritten
            by the next.
        device: Where batches go.
        capture: None: the function is called every time.
        max_graphs: How many shapes are captured at most.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        device: torch.device,
        capture: Capture | None,
        max_graphs: int = MAX_GRAPHS,
    ):
        self.function, self.device, self.capture, self.max_graphs = function, device, capture, max_graphs
        self.calls: Counter[Hashable] = Counter()
        self.graphs: dict[Hashable, _Graph] = {}

    def __call__(self, *batch: StaticBatch) -> Tensor:
        """Run the function on a batch, which may lie on the host."""
        if self.capture is None:
            return self.function(*map(self._moved, batch))
        shape = tuple((each.options(), *((x.shape, x.dtype) for x in each.tensors())) for each in batch)
        graph = self.graphs.get(shape)
        if graph is not None:
            graph.fill(batch)
            return graph()
        self.calls[shape] += 1
        moved = tuple(map(self._moved, batch))
        if self.calls[shape] <= WARMUP_CALLS or len(self.graphs) >= self.max_graphs:
            return self.function(*moved)
        graph = self.graphs[shape] = _Graph(self.function, moved, self.capture)
        return graph()

    def _moved(self, batch: StaticBatch) -> StaticBatch:
        return batch.to(self.device, non_blocking=True)


class _Graph:
    """A function captured on one batch, whose tensors others are copied into."""

    def __init__(self, function: Callable[..., Tensor], batch: tuple[StaticBatch, ...], capture: Capture):
        self.batch = batch
        self.result, self.replay = capture(lambda: function(*batch))

    def fill(self, batch: tuple[StaticBatch, ...]) -> None:
        for static, new in zip(self.batch, batch, strict=True):
            for target, source in zip(static.tensors(), new.tensors(), strict=True):
                target.copy_(source, non_blocking=True)

    def __call__(self) -> Tensor:
        self.replay()
        return self.result
