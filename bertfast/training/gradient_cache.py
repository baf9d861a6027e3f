"""Gradient caching: the gradient of a loss that is no sum over examples, with the memory of a part of its batch.

Gao et al. (2021), "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup": embeddings of all parts
are computed without gradients, then the loss and its gradient with respect to them, and at last each part once more,
through which that gradient is propagated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.runtime.generator_state import generator_state, set_generator_state
from bertfast.runtime.precision import autocast
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.tasks.features import ModelInputs


def backward_in_parts(
    task: EmbeddingTask, model: PreTrainedModel, parts: Sequence[ModelInputs], items: Tensor, precision: str
) -> Tensor:
    """Accumulate the gradients of the loss of a pass in parts; dropout is the same in both passes over a part.

    Args:
        task: The task.
        model: The model.
        parts: The parts of the pass, with their labels.
        items: Number of examples of the step, [].
        precision: Precision of the model.

    Returns:
        The loss, fp32 [].
    """

    def vectors_of(part: ModelInputs) -> Tensor:
        with autocast(model.device, precision):
            return task.vectors(model, part)

    parts = [part.to(model.device) for part in parts]
    states, vectors = [], []
    with torch.no_grad():
        for part in parts:
            states.append(generator_state(model.device))
            vectors.append(vectors_of(part))
    whole = torch.cat(vectors).requires_grad_()
    labels = {name: torch.cat([part.arguments[name] for part in parts]) for name in task.label_arguments}
    loss = task.loss_of_vectors(whole, labels, items)
    (gradient,) = torch.autograd.grad(loss, whole)
    gradients = gradient.split([len(x) for x in vectors])
    for part, state, of_part in zip(parts, states, gradients, strict=True):
        set_generator_state(model.device, state)
        torch.autograd.backward(vectors_of(part), of_part)
    return loss.detach()
