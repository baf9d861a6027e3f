"""From the arguments of a Hugging Face BERT, padded or packed, to packed tokens; and back for what it returns.

Unpadding waits for a GPU once, for the number of tokens. Under `torch.compile` it does not: every caller's position has
a slot then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.dropout import RngCoordinates, draw_seed
from bertfast.runtime.torch_compat import is_readable
from bertfast.sequences import Sequences, bucket, require


@dataclass(frozen=True, eq=False)
class Packed:
    """What the encoder takes: T packed tokens of S sequences.

    Attributes:
        token_ids: int [T], or None where `embeddings` [T, H] are given instead.
        token_type_ids, position_ids: int [T].
        sequences: which token belongs where.
        first: int64 [S], the row that speaks for each sequence: its [CLS].
        query_only: number of slots at the end, behind those of the sequences, for query-only tokens: S, one for each
            sequence, or 0. A query-only token attends to its sequence without being attended to; it is the [CLS] of a
            padded row whose mask leaves it out. Slots of sequences that need none are padding slots.
        rng: the tokens' RNG coordinates, for dropout; None where nothing is dropped.
    """

    token_ids: Tensor | None
    embeddings: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    first: Tensor
    query_only: int = 0
    rng: RngCoordinates | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the packed tokens lie in the caller's [rows, columns].

    Attributes:
        shape: (rows, columns).
        indices: int64 [T], each slot's index in the flattened rows and columns, rows · columns for a padding slot; None
            where the caller's one row is the packed tokens in order.
        has_padding_slots: whether there may be padding slots.
    """

    shape: tuple[int, int]
    indices: Tensor | None
    has_padding_slots: bool = False

    @classmethod
    def of(cls, sequences: Sequences, columns: int) -> Layout:
        """Lay out one sequence per row, of which none may be longer than `columns`."""
        rows = len(sequences)
        indices = sequences.sequence_index * columns + sequences.position
        return cls((rows, columns), torch.where(sequences.is_token, indices, rows * columns), True)

    def unpad(self, values: Tensor, name: str, fill: float = 0.0) -> Tensor:
        """[rows, columns, …] -> [T, …], `fill` in padding slots."""
        if values.shape[:2] != self.shape:
            raise ValueError(f"{name} must begin with shape {list(self.shape)}, got {list(values.shape)}")
        values = values.flatten(0, 1)
        if self.indices is None:
            return values
        if self.has_padding_slots:
            values = torch.cat([values, values.new_full((1, *values.shape[1:]), fill)])
        return values[self.indices]

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[T, …] -> [rows, columns, …], `fill` where the caller has padding."""
        if self.indices is None:
            return values.unsqueeze(0)
        size = self.shape[0] * self.shape[1]
        # Padding slots are written behind the last row, which is cut off.
        padded = values.new_full((size + self.has_padding_slots, *values.shape[1:]), fill)
        return padded.index_copy(0, self.indices, values)[:size].unflatten(0, self.shape)

    def slots(self) -> Tensor:
        """int64 [rows · columns]: the slot of each element of the flattened rows and columns, -1 at padding."""
        size = self.shape[0] * self.shape[1]
        slots = self.indices.new_full((size + self.has_padding_slots,), -1)
        return slots.index_copy(0, self.indices, torch.arange(len(self.indices), device=slots.device))[:size]


def unpad(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    positions: int,
    training: bool = False,
    pooled: bool = True,
    pool_last: bool = False,
    bucketed: bool = False,
) -> tuple[Packed, Layout]:
    """Pack the attended tokens of a padded batch [B, L], or take a packed one [1, T] with `cu_seq_lens_q` as it is.

    Args:
        max_length_q: bound on the lengths of a packed batch; the greatest length if it is on the CPU and not given.
        positions: how many positions the model has.
        pooled: column 0 of every row will be read, also where it is masked out.
        pool_last: a sequence's last token speaks for it, as in a causal model.
        bucketed: fill up the tokens of a padded batch with padding slots to one of few sizes, see `sequences.bucket`.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    given, wanted = (input_ids, "input_ids must have shape [batch, length]")
    if given is None:
        given, wanted = (inputs_embeds, "inputs_embeds must have shape [batch, length, hidden]")
    if given.dim() != wanted.count(",") + 1 or 0 in given.shape:
        raise ValueError(f"{wanted}, none of them 0, got {list(given.shape)}")
    needs_query_only = None
    if cu_seq_lens_q is not None:
        bound = max_length_q if isinstance(max_length_q, int) else None
        if bound is None and not is_readable(cu_seq_lens_q):
            bound = given.shape[1] if position_ids is not None else min(given.shape[1], positions)
        layout, sequences = _from_cu_seqlens(given, attention_mask, cu_seq_lens_q, bound)
        columns, longest = sequences.position, sequences.max_seqlen_bound
    else:
        layout, sequences, needs_query_only = _from_mask(given, attention_mask, pooled, bucketed)
        columns, longest = layout.indices % layout.shape[1], layout.shape[1]
    if position_ids is None and longest > positions:
        raise ValueError(f"{longest} tokens in a row are more than the {positions} positions that the model knows")

    def unpad_or(values: Tensor | None, name: str, default: Tensor | None) -> Tensor | None:
        if values is None:
            return default
        one_row_for_all = values.shape == (1, layout.shape[1])
        return layout.unpad(values.expand(layout.shape) if one_row_for_all else values, name)

    first = sequences.last if pool_last else sequences.first
    if needs_query_only is not None:
        slots = torch.arange(sequences.capacity - len(sequences), sequences.capacity, device=given.device)
        first = torch.where(needs_query_only, slots, first)
    packed = Packed(
        token_ids=unpad_or(input_ids, "input_ids", None),
        embeddings=unpad_or(inputs_embeds, "inputs_embeds", None),
        token_type_ids=unpad_or(token_type_ids, "token_type_ids", torch.zeros_like(columns)),
        position_ids=unpad_or(position_ids, "position_ids", columns),
        sequences=sequences,
        first=first,
        query_only=0 if needs_query_only is None else len(sequences),
        rng=_rng_coordinates(sequences, needs_query_only is not None) if training else None,
    )
    return packed, layout


def _rng_coordinates(sequences: Sequences, has_query_only: bool) -> RngCoordinates:
    ids, position = sequences.token_sequence_ids, sequences.position
    if has_query_only:  # they have the position behind their sequence's last token
        rest = sequences.capacity - len(sequences)
        ids = torch.cat([ids[:rest], sequences.sequence_ids])
        position = torch.cat([position[:rest], sequences.cu_seqlens.diff().long()])
    return RngCoordinates(draw_seed(ids.device), ids, position)


def _from_mask(
    given: Tensor, mask: Tensor | None, pooled: bool, bucketed: bool
) -> tuple[Layout, Sequences, Tensor | None]:
    """Find the tokens of a padded batch; the last result is bool [B], which rows need a query-only token, if any do."""
    (rows, columns), device = given.shape[:2], given.device
    size, ids = rows * columns, torch.arange(rows, device=device)
    if mask is None:
        cu_seqlens = torch.arange(0, size + 1, columns, dtype=torch.int32, device=device)
        layout = Layout((rows, columns), torch.arange(size, device=device))
        return layout, Sequences(cu_seqlens, ids, size, columns), None
    if mask.shape != (rows, columns):
        raise ValueError(
            f"attention_mask must have shape {[rows, columns]} like the input, got {list(mask.shape)}; "
            "masks between pairs of tokens are not supported"
        )
    attended = mask != 0
    lengths, starts_masked = attended.sum(1), ~attended[:, 0]
    if torch.compiler.is_compiling():  # one graph for any number of tokens, with or without query-only tokens
        indices, has_query_only, has_padding_slots = attended.flatten().nonzero().squeeze(1), pooled, pooled
    else:
        tokens, any_masked = torch.stack([lengths.sum(), starts_masked.any()]).tolist()  # waits for the device, once
        has_query_only = pooled and bool(any_masked)
        slots = min(bucket(tokens), size) if bucketed else tokens
        has_padding_slots = has_query_only or slots > tokens
        # Each attended position, flattened, is written to its slot; the others are written behind the last slot.
        slot = torch.where(attended.flatten(), attended.flatten().cumsum(0) - 1, slots)
        indices = torch.full((slots + 1,), size, device=device)
        indices = indices.scatter(0, slot, torch.arange(size, device=device))[:slots]
        if has_padding_slots:
            indices = torch.where(torch.arange(slots, device=device) < lengths.sum(), indices, size)
    if has_query_only:
        indices = torch.cat([indices, torch.where(starts_masked, ids * columns, size)])
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    sequences = Sequences(cu_seqlens, ids, len(indices), columns)
    return Layout((rows, columns), indices, has_padding_slots), sequences, starts_masked if has_query_only else None


def _from_cu_seqlens(
    given: Tensor, mask: Tensor | None, cu_seq_lens: Tensor, bound: int | None
) -> tuple[Layout, Sequences]:
    if given.shape[0] != 1:
        raise ValueError(f"packed input with cu_seq_lens_q must have shape [1, tokens], got {list(given.shape)}")
    if mask is not None:
        rule = "packed input with cu_seq_lens_q takes no attention_mask: leave the padding out instead"
        require(mask.all(), rule, lambda: mask.min())
    cu_seq_lens = cu_seq_lens.to(given.device, non_blocking=True)
    sequences = Sequences.from_cu_seqlens(cu_seq_lens, capacity=given.shape[1], max_seqlen_bound=bound)
    return Layout((1, given.shape[1]), None), sequences
