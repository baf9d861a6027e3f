"""A step of fine-tuning: gradients of its batches, clipping and optimizers. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.cuda_graph import Capture, GraphRunner, capture_for
from bertfast.runtime.precision import autocast
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.tasks.features import Features, ModelInputs, count_labels
from bertfast.tasks.task import Task
from bertfast.training.distributed import Distributed
from bertfast.training.finetune_model import balanced_weights, finetuning_optimizers, single_labels
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.gradient_cache import backward_in_parts
from bertfast.training.optimizer import step_if_finite
from bertfast.training.schedule import set_learning_rate


class FinetuneStep:
    """A step of a run. With `capture`, its gradients and its update are captured in CUDA graphs.

    Args:
        task: Task that computes the loss.
        model: Model that is trained.
        optimizers: Its optimizers.
        distributed: Processes of the run, and the model's device.
        precision: fp32, bf16 or fp16.
        max_grad_norm: Gradient-clipping norm (0 = off).
        capture: See `GraphRunner`.
        class_weights: Weight of each label in the loss, fp32 [labels]; None: 1.
        label_smoothing: Fraction of the target that all labels share equally.

    Attributes:
        weights: The class weights on the device.
        items: Labels of the step, or their weights, over which the loss is a mean, fp32 [].
        loss: Loss of the step so far, fp32 [].
    """

    def __init__(
        self,
        task: Task[Any],
        model: PreTrainedModel,
        optimizers: list[Optimizer],
        *,
        distributed: Distributed,
        precision: str,
        max_grad_norm: float,
        capture: Capture | None = None,
        class_weights: Tensor | None = None,
        label_smoothing: float = 0.0,
    ):
        self.task, self.model, self.optimizers, self.distributed = task, model, optimizers, distributed
        self.device = device = distributed.device
        self.precision, self.max_grad_norm, self.captures = precision, max_grad_norm, capture is not None
        self.label_smoothing = label_smoothing
        # Captured steps read these tensors at fixed addresses.
        self.host_weights = class_weights
        self.weights = None if class_weights is None else class_weights.to(device)
        self.items = torch.ones((), device=device)
        self.loss = torch.zeros((), device=device)
        self._accumulate = GraphRunner(self._accumulate_eagerly, device, capture)
        self._update = GraphRunner(self._update_eagerly, device, capture)

    @property
    def calls(self) -> Any:
        """Calls of the passes so far, by shape; see `GraphRunner`."""
        return self._accumulate.calls

    def gradients(self, passes: Sequence[Sequence[ModelInputs]]) -> None:
        """Compute the gradients of the mean loss over the labels of all passes, of all ranks.

        Args:
            passes: Batches of the passes of this rank, in host memory.
        """
        weights = sum(self._weight(batch.arguments) for batches in passes for batch in batches)
        items = self.distributed.sum(torch.tensor(float(weights), dtype=torch.float64)).item()
        self.items.fill_(items or 1)  # 0 if all labelled words were cut off
        self.loss.zero_()
        for batches in passes:
            if isinstance(self.task, EmbeddingTask) and len(batches) > 1:
                self.loss.add_(backward_in_parts(self.task, self.model, batches, self.items, self.precision))
                continue
            for batch in batches:
                self._accumulate(batch.pin_memory() if self.device.type == "cuda" else batch)
        self.distributed.sum(self.loss)
        self.distributed.sum_gradients(self.model)

    def update(self, rate: float) -> Tensor:
        """Clip the gradients and take the optimizers' step.

        Args:
            rate: Learning rate.

        Returns:
            [2]: the loss, and the gradient norm, NaN if the step was skipped because one of them was not finite.
        """
        set_learning_rate(self.optimizers, rate)
        return self._update().clone()  # a replay overwrites the previous result

    def _accumulate_eagerly(self, batch: ModelInputs) -> Tensor:
        """Accumulate a batch's gradients and its loss; return the step's loss so far, []."""
        with autocast(self.device, self.precision):
            loss = self._loss(batch)
        torch.autograd.backward(loss)
        return self.loss.add_(loss.detach())

    def _update_eagerly(self) -> Tensor:
        norm = step_if_finite(self.model, self.optimizers, self.max_grad_norm, self.loss, keep_gradients=self.captures)
        return torch.stack([self.loss, norm.to(self.loss.dtype)])

    def _weight(self, batch: dict[str, Tensor]) -> float:
        """Return the weight of a batch in the mean loss of its step: its number of labels, or their class weights."""
        if self.host_weights is None:
            return count_labels(batch)
        labels = batch["labels"]
        return self.host_weights[labels[labels >= 0]].sum().item()

    def _loss(self, batch: ModelInputs) -> Tensor:
        """Return a batch's share of the mean loss of its step, []."""
        if self.weights is None and not self.label_smoothing:
            return self.task.loss(self.model, batch, self.items)
        labels = batch.arguments["labels"].flatten()
        logits = self.task.logits(self.model, batch).flatten(0, -2).float()
        options: dict[str, Any] = {"ignore_index": IGNORE_INDEX, "label_smoothing": self.label_smoothing}
        return F.cross_entropy(logits, labels, self.weights, reduction="sum", **options) / self.items


def finetuning_step(
    settings: FinetuneSettings,
    task: Task[Any],
    model: PreTrainedModel,
    *,
    features: Features,
    distributed: Distributed,
    precision: str,
    captures: bool,
) -> FinetuneStep:
    """Return the step of a run, with new optimizers.

    Args:
        settings: Settings of the run.
        task: Its task.
        model: Model that is trained.
        features: Training data.
        distributed: Processes of the run.
        precision: fp32, bf16 or fp16.
        captures: Whether the model can be captured in CUDA graphs.
    """
    options = settings.optimizer
    if options.label_smoothing_factor:
        single_labels(features, "--label-smoothing-factor")
    balanced = options.class_weights == "balanced"
    enabled = captures and settings.compute.cuda_graph and task.captures
    return FinetuneStep(
        task,
        model,
        finetuning_optimizers(settings, model),
        distributed=distributed,
        precision=precision,
        max_grad_norm=options.max_grad_norm,
        capture=capture_for(model, precision, enabled=enabled),
        class_weights=balanced_weights(features, model.config.num_labels or 0) if balanced else None,
        label_smoothing=options.label_smoothing_factor,
    )
