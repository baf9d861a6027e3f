"""BERT's input: the sum of three embeddings, normalised (Devlin et al., 2019, section 3, figure 2)."""

from __future__ import annotations

from torch import Tensor

from bertfast import reference
from bertfast.dropout import Dropout
from bertfast.ops.choice import Implementation, check, choose


def embed(
    token_ids: Tensor | None,
    token_type_ids: Tensor,
    position_ids: Tensor,
    word: Tensor,
    position: Tensor,
    token_type: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    dropout: Dropout | None = None,
    *,
    padding_index: int | None = None,
    implementation: Implementation | None = None,
) -> Tensor:
    """dropout(LN(word[token_ids] + token_type[token_type_ids] + position[position_ids])).

    Args:
        token_ids: int [T]; None if `word` already is the embedded tokens [T, H].
        token_type_ids, position_ids: int [T]. Indices are not checked here: that would wait for the device.
        word, position, token_type: [V, H], [positions, H], [types, H], floating point.
        gamma, beta: [H], of the LayerNorm.
        eps: of the LayerNorm, used in fp32.
        padding_index: the word whose embedding gets no gradient, as in `torch.nn.Embedding`.

    Returns:
        [T, H] in word's dtype.
    """
    check(
        "embed",
        dropout,
        token_ids=(token_ids, "tokens", "integer"),
        token_type_ids=(token_type_ids, "tokens", "integer"),
        position_ids=(position_ids, "tokens", "integer"),
        word=(word, "tokens hidden" if token_ids is None else "vocabulary hidden", "floating"),
        position=(position, "positions hidden", "floating"),
        token_type=(token_type, "types hidden", "floating"),
        gamma=(gamma, "hidden", "floating"),
        beta=(beta, "hidden", "floating"),
    )
    choose("embed", implementation, word)
    return reference.embed(
        token_ids, token_type_ids, position_ids, word, position, token_type, gamma, beta, eps, dropout, padding_index
    )
