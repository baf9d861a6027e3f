"""Loading of a run's batches, ahead of time and in worker processes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bertfast.data.batches import Batch

BatchIndex = tuple[int, int]
"""Phase of a run, and index of a batch in it."""


class Loader:
    """Iterator over a sequence of batches; their order does not depend on the number of worker processes.

    Args:
        make: Returns the batch of an index; called in the worker processes.
        indices: Yields the indices in order; called in each worker process.
        workers: Number of worker processes; 0: batches are made when they are requested.
        pin: Whether to put batches into pinned memory, from which a GPU copies without waiting.

    Attributes:
        waited: Total seconds spent waiting for batches.
    """

    def __init__(
        self,
        make: Callable[[BatchIndex], Batch],
        indices: Callable[[], Iterator[BatchIndex]],
        workers: int,
        pin: bool,
    ):
        prefetched = 4 if workers else None
        self._batches: Iterator[Batch] = iter(
            DataLoader(
                _BatchStream(make, indices),
                batch_size=None,
                num_workers=workers,
                pin_memory=pin,
                prefetch_factor=prefetched,
            )
        )
        self.waited = 0.0

    def next(self) -> Batch:
        """Return the next batch."""
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        return batch


class _BatchStream(IterableDataset[Batch]):
    def __init__(self, make: Callable[[BatchIndex], Batch], indices: Callable[[], Iterator[BatchIndex]]):
        self.make, self.indices = make, indices

    def __iter__(self) -> Iterator[Batch]:
        # DataLoader asks its workers in turn, so each of n workers makes every n-th batch.
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.make, itertools.islice(self.indices(), first, None, step))
