"""One step of pre-training: its batches' gradients, clipping, the optimizers. Nothing here waits for the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from bertfast.data.batches import Batch
from bertfast.encoder import PackedHead, PretrainingLoss, pretraining_loss
from bertfast.runtime.cuda_graph import Capture, GraphRunner
from bertfast.runtime.precision import autocast
from bertfast.training.distributed import Distributed
from bertfast.training.optimizer import step_if_finite
from bertfast.training.schedule import set_learning_rate


class Objective(nn.Module):
    """The losses of a batch as a module, which ranks can share; they come as a tuple, which hooks can see through.

    Args:
        model: The model that is trained.
        residual_dtype: The dtype of the residual stream; None: that of the embeddings.
    """

    def __init__(self, model: PackedHead, residual_dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.residual_dtype = model, residual_dtype

    def forward(self, batch: Batch, seed: Tensor | None) -> tuple[Tensor, ...]:
        loss = pretraining_loss(self.model, batch, seed, residual_dtype=self.residual_dtype)
        return tuple(getattr(loss, entry.name) for entry in dataclasses.fields(loss))


class TrainStep:
    """A step on static shapes, each of its halves captured in a graph where `capture` is given.

    Args:
        objective: An `Objective`, shared by the ranks.
        optimizers: Of the objective's parameters.
        distributed: Processes that compute the step together.
        precision: fp32, bf16 or fp16; with the last, `scaler` is the loss's.
        seed: int64 [], dropout's.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        capture: See `GraphRunner`.
    """

    def __init__(
        self,
        objective: nn.Module,
        optimizers: list[Optimizer],
        distributed: Distributed,
        *,
        precision: str,
        seed: Tensor,
        max_grad_norm: float,
        capture: Capture | None = None,
    ):
        self.objective, self.optimizers, self.distributed = objective, optimizers, distributed
        self.precision, self.seed, self.max_grad_norm = precision, seed, max_grad_norm
        self.scaler = GradScaler(distributed.device.type) if precision == "fp16" else None
        self.counts = torch.ones(2, device=distributed.device)
        self.sums = torch.zeros(4, dtype=torch.float64, device=distributed.device)
        self.captures = capture is not None
        self._accumulate = GraphRunner(self._accumulate_eagerly, distributed.device, capture)
        self._update = GraphRunner(self._update_eagerly, distributed.device, capture)

    def gradients(self, batches: Sequence[Batch], masked: int, pairs: int) -> Tensor:
        """Leave the gradients of the step's batches, of all ranks, on the parameters.

        `masked` and `pairs` are those of all ranks together: means run over them, however the step is cut. Returns
        fp64 [4], overwritten by the next step: the sums of masked-LM loss, blanks right, next-sentence loss, pairs
        right.
        """
        self.counts[0].fill_(masked)
        self.counts[1].fill_(pairs)
        self.sums.zero_()
        for place, batch in enumerate(batches, 1):
            with self.distributed.no_sync(self.objective, place == len(batches)):
                self._accumulate(batch)
        return self.distributed.sum(self.sums)

    def update(self, rate: float) -> Tensor:
        """Take the optimizers' step at a learning rate. Returns the gradients' norm, fp32 []: NaN where it was skipped,
        as the norm or a loss was not finite."""
        set_learning_rate(self.optimizers, rate)
        return self._update()

    def _accumulate_eagerly(self, batch: Batch) -> Tensor:
        with autocast(self.distributed.device, self.precision):
            loss = PretrainingLoss(*self.objective(batch, self.seed))
        # Gradients of ranks become their mean, so each counts as often as there are ranks.
        total = (loss.masked_lm / self.counts[0] + loss.next_sentence / self.counts[1]) * self.distributed.world_size
        (total if self.scaler is None else self.scaler.scale(total)).backward()
        parts = [loss.masked_lm.detach(), loss.masked_correct, loss.next_sentence.detach(), loss.next_sentence_correct]
        return self.sums.add_(torch.stack([part.double() for part in parts]))

    def _update_eagerly(self) -> Tensor:
        return step_if_finite(
            self.objective, self.optimizers, self.max_grad_norm, self.sums, self.scaler, keep_gradients=self.captures
        )
