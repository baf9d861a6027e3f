"""Exact search: the vectors that are most similar to queries, of vectors that arrive in chunks.

Shapes: Q queries, C vectors of a chunk, K results of a query, D embedding size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

Similarity = Literal["cosine", "dot"]


def most_similar(
    queries: Tensor, chunks: Iterable[Tensor], k: int, similarity: Similarity, source: str
) -> tuple[Tensor, Tensor]:
    """Return the vectors that are most similar to queries, from the most similar on; equal ones in their order.

    Args:
        queries: fp32 [Q, D].
        chunks: fp32 [C, D] each, all vectors in order.
        k: Vectors per query; fewer are returned if there are fewer.
        similarity: How vectors are compared.
        source: Where vectors are from, for messages.

    Returns:
        Similarities, fp32 [Q, K], and the indices of the vectors, int64 [Q, K].

    Raises:
        ValueError: A similarity is not finite.
    """
    if similarity == "cosine":
        queries = queries / _norms(queries)[:, None]
    scores, indices = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
    first = 0
    for vectors in chunks:
        found = queries @ vectors.T
        if similarity == "cosine":
            found /= _norms(vectors)
        if not found.isfinite().all():
            rows = f"{first + 1} to {first + len(vectors)}"
            raise ValueError(f"{source}: vectors are not finite in rows {rows}; embed the texts again")
        columns = _best_columns(found, k)
        scores, indices = torch.cat([scores, found.gather(1, columns)], 1), torch.cat([indices, columns + first], 1)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        scores, indices = scores[:, :k], indices.gather(1, order[:, :k])
        first += len(vectors)
    return scores, indices


def _best_columns(scores: Tensor, k: int) -> Tensor:
    """Return the columns of the k highest scores of each row, ascending, int64 [Q, K]; of equal scores, the first.

    Args:
        scores: fp32 [Q, C].
        k: Columns per row; all are returned if there are fewer.
    """
    width = scores.shape[1]
    best, columns = scores.topk(min(k + 1, width), dim=1)
    if k < width:
        # `topk` chooses arbitrarily between scores that are equal at the cut.
        is_cut_within_equals = best[:, k - 1] == best[:, k]
        columns = columns[:, :k]
        if is_cut_within_equals.any():
            order = scores[is_cut_within_equals].sort(dim=1, descending=True, stable=True)[1]
            columns[is_cut_within_equals] = order[:, :k]
    return columns.sort(dim=1)[0]


def _norms(vectors: Tensor) -> Tensor:
    """Return the lengths of vectors, at least 1e-12, by which a zero vector can be divided."""
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=1)
    return norms.clamp_min(1e-12)
