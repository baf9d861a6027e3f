"""Losses of embeddings, as sentence-transformers defines them. They depend on all examples of a batch together.

Shapes: E examples, C texts of each, D embedding size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.tasks.settings import EmbeddingSettings, LossName


def embedding_loss(
    name: LossName, embeddings: Tensor, labels: Tensor, text_ids: Tensor, settings: EmbeddingSettings
) -> Tensor:
    """Compute the mean loss of a batch, added over the sizes of --matryoshka-dims.

    Args:
        name: The loss.
        embeddings: fp32 [E, C, D]: anchors, positives and negatives, or the two texts of pairs.
        labels: fp32 [E], the scores of pairs; multiple-negatives-ranking does not use them.
        text_ids: int64 [E, C], equal where texts are; only multiple-negatives-ranking uses them.
        settings: Scale, margin and sizes.

    Returns:
        fp32 [].
    """
    total = embeddings.new_zeros(())
    for size in settings.matryoshka_dims or [embeddings.shape[2]]:
        truncated = embeddings[..., :size]
        if name == "multiple-negatives-ranking":
            total = total + multiple_negatives_ranking(truncated, text_ids, settings.similarity_scale)
        elif name == "cosent":
            total = total + cosent(cosines(truncated)[:, 0], labels, settings.similarity_scale)
        else:
            total = total + contrastive(cosines(truncated)[:, 0], labels, settings.contrastive_margin)
    return total


def cosines(embeddings: Tensor) -> Tensor:
    """Return the cosines of each example's first text and its others: [E, C, D] -> [E, C - 1]."""
    directions = F.normalize(embeddings, dim=-1)
    return (directions[:, :1] * directions[:, 1:]).sum(-1)


def multiple_negatives_ranking(embeddings: Tensor, text_ids: Tensor, scale: float) -> Tensor:
    """Compute the cross entropy of finding each anchor's positive among all positives and negatives of the batch.

    Henderson et al. (2017). A positive of an anchor, or of an equal anchor, does not count as one of its negatives
    where its text occurs again.

    Args:
        embeddings: fp32 [E, C, D].
        text_ids: int64 [E, C], equal where texts are.
        scale: Factor of the cosines.
    """
    count = len(embeddings)
    directions = F.normalize(embeddings, dim=-1)
    candidates = directions[:, 1:].transpose(0, 1).flatten(0, 1)  # [(C - 1) · E, D]: all positives, then the negatives
    logits = scale * directions[:, 0] @ candidates.T
    candidate_ids = text_ids[:, 1:].T.flatten()
    positives = torch.arange(count, device=logits.device)
    right = candidate_ids == text_ids[:, 1:2]  # [E, (C - 1) · E]
    right[:, :count] |= text_ids[:, 0] == text_ids[:, :1]
    right[positives, positives] = False  # the positive itself
    return F.cross_entropy(logits.masked_fill(right, -torch.inf), positives)


def cosent(similarities: Tensor, scores: Tensor, scale: float) -> Tensor:
    """Compute log(1 + Σ exp(scale · (s_i - s_j))) over all i and j of which j has the higher score.

    Su (2022), https://kexue.fm/archives/8847.

    Args:
        similarities: fp32 [E], the cosines s of pairs.
        scores: fp32 [E].
        scale: Factor of the cosines.
    """
    scaled = scale * similarities
    differences = scaled[:, None] - scaled[None, :]
    differences = differences.masked_fill(scores[:, None] >= scores[None, :], -torch.inf)
    return torch.cat([scaled.new_zeros(1), differences.flatten()]).logsumexp(0)


def contrastive(similarities: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Compute the mean of half the squared cosine distance of pairs labelled 1, and half the square of what that of
    pairs labelled 0 lacks of the margin.

    Hadsell et al. (2006).

    Args:
        similarities: fp32 [E], the cosines of pairs.
        labels: fp32 [E] of 0 and 1.
        margin: The margin.
    """
    distances = 1 - similarities
    losses = labels * distances.square() + (1 - labels) * F.relu(margin - distances).square()
    return losses.mean() / 2
