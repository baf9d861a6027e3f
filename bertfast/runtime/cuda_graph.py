"""CUDA graphs of functions of a batch: captured once per shape, then replayed with one launch instead of hundreds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import unsupported_reason
from bertfast.runtime.precision import ModelConfig, half

Capture = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Captures the kernels that a function launches; returns the tensor of its result and a function that replays them."""

WARMUP_CALLS = 3  # calls before a capture, during which kernels are compiled and libraries allocate workspaces
MAX_GRAPHS = 16  # per runner; graphs share their memory, but each keeps its batch and its nodes


class StaticBatch(Protocol):
    """Batch that a runner can copy into a captured one."""

    def to(self, device: torch.device, non_blocking: bool = False) -> StaticBatch:
        """Return the batch on a device, without waiting for the copy if `non_blocking`."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the batch, in the same order for all batches."""
        ...

    def options(self) -> Hashable:
        """Return what, besides the shapes of the tensors, determines which operations run."""
        ...


class CapturableModel(Protocol):
    """Model, as far as `capture_for` reads it."""

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of its parameters."""
        ...

    def modules(self) -> Iterator[nn.Module]:
        """Return all modules of the model."""
        ...


def cuda_graph(function: Callable[[], Tensor], pool: Any) -> tuple[Tensor, Callable[[], None]]:
    """Capture `function` on the current stream, which must not be the default stream, without running it.

    Args:
        function: Function to capture.
        pool: Memory pool of the graph, from `torch.cuda.graph_pool_handle`.
    """
    graph = torch.cuda.CUDAGraph()
    # The thread that pins batches may allocate during the capture.
    with torch.cuda.graph(graph, pool, torch.cuda.current_stream(), capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


def cuda_graphs() -> Capture:
    """Return a function that captures CUDA graphs in one memory pool.

    Replays must not overlap, and the result of a replay must be read or copied before the next one.
    """
    return partial(cuda_graph, pool=torch.cuda.graph_pool_handle())


def can_capture(config: ModelConfig, precision: str, device: torch.device) -> bool:
    """Return whether the passes of a model can be captured: on a GPU, if attention runs in a kernel.

    The attention of the reference takes too much memory to be kept for a graph.
    """
    if device.type != "cuda" or config.hidden_size // config.num_attention_heads not in HEAD_DIMENSIONS:
        return False
    return unsupported_reason("triton", "attention", torch.empty(0, dtype=half(precision), device=device)) is None


def capture_for(model: CapturableModel, precision: str, *, enabled: bool) -> Capture | None:
    """Return a function that captures the passes of a model; None: they run eagerly."""
    # An LSTM reads the lengths of the sequences on the host and therefore waits for the device.
    waits = any(isinstance(module, nn.LSTM) for module in model.modules())
    if not enabled or waits or not can_capture(model.config, precision, model.device):
        return None
    return cuda_graphs()


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Run the body on a new stream of a GPU, which can be captured; the default stream cannot."""
    if device.type != "cuda":
        yield
        return
    stream, default = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


class GraphRunner:
    """Runs a function of a batch, or of nothing, from a CUDA graph after a few warm-up calls per shape.

    Shapes that have not been seen often enough, and new shapes after `max_graphs` captures, run eagerly.

    Args:
        function: Function that reads only tensors on the device and returns a tensor, which the next replay overwrites.
        device: Device that batches are moved to.
        capture: Function that captures; None: every call runs eagerly.
        max_graphs: Maximum number of shapes to capture.
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
        """Run the function on a batch, which may be on the host."""
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
    """A captured function and the batch that it reads, into which other batches are copied."""

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
