"""Functions that a CUDA graph replays: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bertfast.config import BertConfig
from bertfast.data.batches import Batch
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.choice import why_not
from bertfast.precision import half

Recorder = Callable[[Callable[[], Tensor]], tuple[Tensor, Callable[[], None]]]
"""Records what a function launches; returns the tensor in which its result will lie, and what replays it all."""

EAGER = 3  # calls before a function is recorded, in which its kernels are compiled and libraries take their workspaces


def cuda_graph(function: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
    """Record `function` on the current stream, which must not be the default one. Recording does not run it."""
    graph = torch.cuda.CUDAGraph()
    # A thread that pins batches meanwhile may allocate.
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"):
        result = function()
    return result, graph.replay


def can_record(config: BertConfig, precision: str, device: torch.device) -> bool:
    """Whether a step of such a model can be recorded: on a GPU with kernels for its attention, which plain PyTorch
    computes sequence by sequence."""
    if device.type != "cuda" or config.hidden_size // config.num_attention_heads not in HEAD_DIMENSIONS:
        return False
    return why_not("triton", "attention", torch.empty(0, dtype=half(precision), device=device)) is None


@contextmanager
def side_stream(device: torch.device) -> Iterator[None]:
    """Work on a stream of a GPU that can be recorded; the default one cannot."""
    if device.type != "cuda":
        yield
        return
    stream, default = torch.cuda.Stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(default)
    with torch.cuda.stream(stream):
        yield
    default.wait_stream(stream)


class Replayed:
    """A function of a batch, or of nothing, that is recorded after a few calls and replayed from then on.

    Args:
        function: Reads of the batch only what is on the device, and returns a tensor; that of a replay is overwritten
            by the next.
        device: Where batches go.
        record: None: the function is called every time.

    Batches of other shapes, those of a second phase, are recorded anew.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device, record: Recorder | None):
        self.function, self.device, self.record = function, device, record
        self.shapes, self.calls, self.batch, self.replay = None, 0, None, None

    def __call__(self, *batch: Batch) -> Tensor:
        if self.record is None:
            return self.function(*map(self._moved, batch))
        shapes = [(each.sequences.max_seqlen_bound, *(tensor.shape for tensor in each.tensors())) for each in batch]
        if shapes != self.shapes:
            self.shapes, self.calls, self.batch, self.replay = shapes, 0, None, None
        self.calls += 1
        if self.calls <= EAGER:
            return self.function(*map(self._moved, batch))
        if self.replay is None:
            self.batch = tuple(each.for_any_lengths() for each in map(self._moved, batch))
            self.result, self.replay = self.record(lambda: self.function(*self.batch))
        else:
            for own, new in zip(self.batch, batch, strict=True):
                own.fill(new)
        self.replay()
        return self.result

    def _moved(self, batch: Batch) -> Batch:
        return batch.to(self.device, non_blocking=True)
