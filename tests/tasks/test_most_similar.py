"""Exact search keeps the order of vectors that are equally similar, at the cut and between chunks."""

import pytest
import torch

from bertfast.tasks.most_similar import most_similar


@pytest.mark.parametrize("k", [1, 3, 19, 20, 30])
@pytest.mark.parametrize("chunk", [20, 7, 1])
def test_equal_vectors_are_found_in_their_order(chunk, k):
    queries = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0]])
    vectors = torch.tensor([[1.0, 0.0]]).repeat(20, 1)
    vectors[11] = torch.tensor([0.0, 1.0])  # the best one of the second query, and not among the first of the others
    found = most_similar(queries, vectors.split(chunk), k, "dot", "vectors")[1]
    others = [row for row in range(20) if row != 11]
    assert found.tolist() == [[*others, 11][:k], [11, *others][:k], [11, *others][:k]]
