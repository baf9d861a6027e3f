"""The processes of a run: those that `torchrun` started, or this one alone."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bertfast.runtime.precision import choose_device

_T = TypeVar("_T")
_PATIENCE = timedelta(hours=6)  # of those who wait while the first rank prepares text


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is, and where it computes. Alone, everything here costs nothing."""

    rank: int
    count: int
    device: torch.device
    joined: bool = False  # whether the processes met here, and not before
    hosts: dist.ProcessGroup | None = None  # the same processes, who tell each other what no GPU need know

    @classmethod
    def join(cls, device: str | None = None) -> Ranks:
        """Meet the other processes, if `torchrun` has started some; each takes a GPU of its own, or the CPU."""
        count = int(os.environ.get("WORLD_SIZE", 1))
        if count == 1:
            return cls(0, 1, choose_device(device))
        local = int(os.environ["LOCAL_RANK"])
        if device is None and torch.cuda.is_available():
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"there are {torch.cuda.device_count()} GPUs here and process {local} wants one of its own: "
                    "start as many processes as there are GPUs"
                )
            device = f"cuda:{local}"
            torch.cuda.set_device(local)
        chosen = choose_device(device)
        joined = not dist.is_initialized()
        if joined:
            # torchrun's store outlives its workers, and what dead ones left there would mislead those that it starts
            # in their place (PyTorch 2.13): each attempt has keys of its own.
            store, rank, count = next(dist.rendezvous("env://", timeout=_PATIENCE))
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=count, timeout=_PATIENCE)
        hosts = dist.new_group(backend="gloo", timeout=_PATIENCE) if chosen.type == "cuda" else None
        return cls(dist.get_rank(), count, chosen, joined, hosts)

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` of all ranks added up, in place; those on the host wait for no device."""
        if self.count > 1:
            dist.all_reduce(values, group=self.hosts if values.device.type == "cpu" else None)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it is so on any rank."""
        return flag if self.count == 1 else bool(self.sum(torch.tensor(int(flag))))

    def agree(self, value: _T) -> _T:
        """The first rank's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.hosts)
        return box[0]

    def first(self, work: Callable[[], _T]) -> _T | None:
        """What the first rank's `work` returns, there; the others wait, and an error there ends them too."""
        result = error = None
        if self.leads:
            try:
                result = work()
            except Exception as raised:
                error = raised
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ValueError("the first rank could not go on; its message says why")
        return result

    def leave(self) -> None:
        """Part from the other processes, if they met for this."""
        if self.joined:
            dist.destroy_process_group()

    def share(self, objective: nn.Module, layers: nn.ModuleList, shard: bool) -> nn.Module:
        """`objective` on all ranks, its gradients their mean; with `shard` each keeps a part of every parameter.

        A layer is gathered when it runs, all else with the objective.
        """
        if self.count == 1:
            return objective
        if not shard:
            where = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(objective, device_ids=where, gradient_as_bucket_view=True)
        mesh = init_device_mesh(self.device.type, (self.count,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        return fully_shard(objective, mesh=mesh)

    def apart(self, objective: nn.Module, last: bool) -> AbstractContextManager:
        """While it is entered, a shared objective's gradients are summed up here alone, but the `last` time."""
        if self.count == 1:
            return nullcontext()
        if isinstance(objective, DistributedDataParallel):
            return nullcontext() if last else objective.no_sync()
        objective.set_requires_gradient_sync(last)
        return nullcontext()
