"""Processes of a run: those that `torchrun` started, or only this one."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from bertfast.runtime import processes
from bertfast.runtime.precision import choose_device

_T = TypeVar("_T")
_BUCKET = 2**24  # numbers that a message has at least, except for the last
_TIMEOUT = timedelta(hours=6)  # the other ranks wait this long while the main process prepares the text


@dataclass(frozen=True)
class Distributed:
    """The process's rank, the world size and the device. With one process, every method is free of communication.

    Attributes:
        rank: Rank of this process.
        world_size: Number of processes.
        device: Device that this process computes on.
        owns_process_group: Whether `init` created the default process group, which `destroy` then destroys.
        cpu_group: Gloo group of all processes for CPU tensors and objects; None: the default group takes them.
    """

    rank: int
    world_size: int
    device: torch.device
    owns_process_group: bool = False
    cpu_group: dist.ProcessGroup | None = None

    @classmethod
    def init(cls, device: str | None = None) -> Distributed:
        """Initialise the process group if `torchrun` started this process.

        Args:
            device: Device to compute on; None: the GPU of this local rank, or the CPU.

        Raises:
            ValueError: There are more local processes than GPUs, or the device is not available.
        """
        world_size = processes.world_size()
        if world_size == 1:
            return cls(0, 1, choose_device(device))
        local_rank = int(os.environ["LOCAL_RANK"])
        if device is None and torch.cuda.is_available():
            if local_rank >= torch.cuda.device_count():
                raise ValueError(
                    f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                    f"start at most {torch.cuda.device_count()} processes (torchrun --nproc-per-node)"
                )
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(local_rank)
        chosen = choose_device(device)
        owns_process_group = not dist.is_initialized()
        if owns_process_group:
            # torchrun's store outlives its workers, and keys left by a failed attempt would mislead the workers of the
            # next one (PyTorch 2.13): each attempt has its own prefix.
            store, rank, world_size = next(rendezvous("env://", timeout=_TIMEOUT))
            attempt = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
            store = dist.PrefixStore(attempt, store)  # type: ignore[attr-defined]  # public, but not re-exported
            backend = "nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        cpu_group = dist.new_group(backend="gloo", timeout=_TIMEOUT) if chosen.type == "cuda" else None
        return cls(dist.get_rank(), world_size, chosen, owns_process_group, cpu_group)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files, logs and prints (rank 0)."""
        return self.rank == 0

    @contextmanager
    def logs_on_main(self, logger: logging.Logger) -> Iterator[None]:
        """Context in which a logger is silent, except in the main process."""

        def silent(record: logging.LogRecord) -> bool:
            return self.is_main

        logger.addFilter(silent)
        try:
            yield
        finally:
            logger.removeFilter(silent)

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all ranks, in place. CPU tensors are reduced without waiting for a GPU."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.cpu_group if values.device.type == "cpu" else None)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank."""
        return flag if self.world_size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def broadcast(self, value: _T) -> _T:
        """Return the main process's `value` on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group=self.cpu_group)
        return box[0]

    def gather(self, value: _T) -> list[_T]:
        """Return the values of all ranks, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def sum_gradients(self, model: nn.Module) -> None:
        """Sum the gradients of a model over all ranks, in place; what has none on any rank has none afterwards.

        Unlike `wrap`, it suits passes that differ between ranks, and losses that are no output of one module.
        """
        if self.world_size == 1:
            return
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        ranks_with = self.sum(torch.tensor([parameter.grad is not None for parameter in trained], dtype=torch.long))
        bucket: list[Tensor] = []
        for parameter, has_gradient in zip(trained, ranks_with.tolist(), strict=True):
            if not has_gradient:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) > _BUCKET:
                self._sum_together(bucket)
                bucket = []
        self._sum_together(bucket)

    def _sum_together(self, tensors: list[Tensor]) -> None:
        """Sum tensors over all ranks, in place, in one message."""
        if tensors:
            whole = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
            for tensor, part in zip(tensors, whole.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def run_on_main(self, work: Callable[[], _T]) -> _T | None:
        """Call `work` in the main process while the other ranks wait.

        Returns:
            Its result in the main process, None elsewhere.

        Raises:
            ValueError: On the other ranks, if `work` raised; the main process raises the original exception.
        """
        result = error = None
        if self.is_main:
            try:
                result = work()
            except Exception as raised:
                error = raised
        failed = self.any(error is not None)
        if error is not None:
            raise error
        if failed:
            raise ValueError("rank 0 failed: correct the error that it printed, then start all processes again")
        return result

    def result_of_main(self, work: Callable[[], _T]) -> _T:
        """Return on every rank what `work` returns in the main process, which alone calls it; see `run_on_main`."""
        return cast(_T, self.broadcast(self.run_on_main(work)))

    def destroy(self) -> None:
        """Destroy the default process group if `init` created it."""
        if self.owns_process_group:
            dist.destroy_process_group()

    def wrap(self, objective: nn.Module, layers: nn.ModuleList, shard: bool) -> nn.Module:
        """Wrap `objective` so that its gradients are averaged over all ranks.

        Args:
            objective: Module whose forward pass returns the losses.
            layers: Its encoder layers; with `shard`, each is gathered only while it runs.
            shard: Use FSDP2, with which each rank keeps a part of every parameter, instead of DistributedDataParallel.
        """
        if self.world_size == 1:
            return objective
        if not shard:
            device_ids = [self.device] if self.device.type == "cuda" else None
            return DistributedDataParallel(objective, device_ids=device_ids, gradient_as_bucket_view=True)
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(objective, mesh=mesh)
        return objective

    def no_sync(self, objective: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Return a context in which gradients of a wrapped `objective` accumulate locally, unless `last` is true."""
        if self.world_size == 1:
            return nullcontext()
        if isinstance(objective, DistributedDataParallel):
            return nullcontext() if last else objective.no_sync()
        if isinstance(objective, FSDPModule):
            objective.set_requires_gradient_sync(last)
        return nullcontext()
