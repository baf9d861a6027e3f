"""A run's batches, made ahead of time by processes of their own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from bertfast.data.batches import Batch


class Loader:
    """The batches of a row of places, in its order, however many processes make them.

    Args:
        make: The batch at a place; called in the processes.
        places: The places that are wanted, made anew by each process.
        workers: How many processes; 0: batches are made when they are asked for.
        pin: Whether batches lie in pinned memory, from where a GPU copies them without waiting.

    Attributes:
        waited: Seconds that were waited for batches, all together.
    """

    def __init__(self, make: Callable[[tuple], Batch], places: Callable[[], Iterator[tuple]], workers: int, pin: bool):
        row = _Row(make, places)
        self._batches = iter(
            DataLoader(
                row, batch_size=None, num_workers=workers, pin_memory=pin, prefetch_factor=4 if workers else None
            )
        )
        self.waited = 0.0

    def next(self) -> Batch:
        """The next batch."""
        started = time.perf_counter()
        batch = next(self._batches)
        self.waited += time.perf_counter() - started
        return batch


class _Row(IterableDataset):
    def __init__(self, make: Callable[[tuple], Batch], places: Callable[[], Iterator[tuple]]):
        self.make, self.places = make, places

    def __iter__(self) -> Iterator[Batch]:
        # DataLoader asks its processes in turn, so each makes every n-th batch.
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        return map(self.make, itertools.islice(self.places(), first, None, step))
