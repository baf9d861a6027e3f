"""A step of pre-training: gradients of its batches, clipping and optimizers. Nothing here waits for the device."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from bertfast.data.batches import Batch
from bertfast.encoder import PackedMaskedLM, PretrainingLoss, pretraining_loss
from bertfast.runtime.cuda_graph import Capture, GraphRunner
from bertfast.runtime.precision import autocast
from bertfast.training.distributed import Distributed
from bertfast.training.optimizer import step_if_finite
from bertfast.training.schedule import set_learning_rate


class Objective(nn.Module):
    """Computes the losses of a batch; a module, so that DistributedDataParallel and FSDP2 can wrap it.

    It returns the fields of `PretrainingLoss` as a tuple, because the hooks of these wrappers look for tensors in it.

    Args:
        model: Model that is trained.
        residual_dtype: dtype of the residual stream; None: that of the embeddings.
    """

    def __init__(self, model: PackedMaskedLM, residual_dtype: torch.dtype | None = None):
        super().__init__()
        self.model, self.residual_dtype = model, residual_dtype

    def forward(self, batch: Batch, seed: Tensor | None) -> tuple[Tensor, ...]:
        """Return the losses of a batch, without dropout if `seed` is None."""
        loss = pretraining_loss(self.model, batch, seed, residual_dtype=self.residual_dtype)
        return tuple(getattr(loss, entry.name) for entry in dataclasses.fields(loss))


class TrainStep:
    """A step on static shapes. With `capture`, its gradients and its update are captured, one graph each.

    Args:
        objective: An `Objective`, wrapped for the ranks.
        optimizers: Optimizers of its parameters.
        distributed: Processes of the run.
        precision: fp32, bf16 or fp16.
        seed: Seed of dropout, int64 [].
        max_grad_norm: Gradient-clipping norm (0 = off).
        capture: See `GraphRunner`.

    Attributes:
        scaler: Loss scaler in fp16, else None.
        counts: Masked tokens and pairs of the step, over all ranks, fp32 [2].
        sums: Sums of the losses and of the correct predictions, see `gradients`, fp64 [4].
        captures: Whether steps are captured.
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
        """Compute the gradients of the step's batches.

        Args:
            batches: Batches of this rank.
            masked: Masked tokens of the step, over all ranks; the loss is their mean, however the step is divided.
            pairs: Pairs of the step, over all ranks.

        Returns:
            Sums over all ranks, fp64 [4], overwritten by the next step: masked-LM loss, correctly predicted masked
            tokens, next-sentence loss, correctly classified pairs.
        """
        self.counts[0].fill_(masked)
        self.counts[1].fill_(pairs)
        self.sums.zero_()
        for number, batch in enumerate(batches, 1):
            with self.distributed.no_sync(self.objective, number == len(batches)):
                self._accumulate(batch)
        return self.distributed.sum(self.sums)

    def update(self, rate: float) -> Tensor:
        """Clip the gradients and take the optimizers' step.

        Args:
            rate: Learning rate.

        Returns:
            Gradient norm, fp32 []; NaN if the step was skipped because the norm or a loss was not finite.
        """
        set_learning_rate(self.optimizers, rate)
        return self._update()

    def _accumulate_eagerly(self, batch: Batch) -> Tensor:
        with autocast(self.distributed.device, self.precision):
            loss = PretrainingLoss(*self.objective(batch, self.seed))
        # Gradients are averaged over the ranks, which the factor world_size undoes.
        total = (loss.masked_lm / self.counts[0] + loss.next_sentence / self.counts[1]) * self.distributed.world_size
        torch.autograd.backward(total if self.scaler is None else self.scaler.scale(total))
        parts = [loss.masked_lm.detach(), loss.masked_correct, loss.next_sentence.detach(), loss.next_sentence_correct]
        return self.sums.add_(torch.stack([part.double() for part in parts]))

    def _update_eagerly(self) -> Tensor:
        return step_if_finite(
            self.objective, self.optimizers, self.max_grad_norm, self.sums, self.scaler, keep_gradients=self.captures
        )
