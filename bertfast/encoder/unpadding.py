"""Remove padding from the input of a Hugging Face BERT, and restore it in what the encoder computes.

Unpadding waits for a GPU once, for the number of tokens. Under `torch.compile` it does not: that number is a size that
the graph leaves open.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bertfast.ops.dropout import RngCoordinates, draw_seed
from bertfast.ops.sequences import Sequences, bucket, require
from bertfast.runtime.torch_compat import is_readable


@dataclass(frozen=True, eq=False)
class Packed:
    """The input of the encoder: T packed tokens of S sequences.

    Attributes:
        token_ids: int [T], or None if `embeddings` [T, H] are given instead.
        token_type_ids, position_ids: int [T].
        sequences: The sequence and position of each token.
        first: int64 [S], the row of each sequence that is pooled: its [CLS].
        query_only: Number of slots for query-only tokens, after those of the sequences: S, one per sequence, or 0. A
            query-only token attends to its sequence without being attended to; it is the [CLS] of a padded row whose
            mask excludes it. Slots of sequences that need none are padding slots.
        rng: The tokens' RNG coordinates, for dropout; None if nothing is dropped.
        rotary: Tables of rotary positions, fp32 [T, D]: the cos of D / 2 angles, then their sin; by the kind of layer
            that reads them.
    """

    token_ids: Tensor | None
    embeddings: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    first: Tensor
    query_only: int = 0
    rng: RngCoordinates | None = None
    rotary: Mapping[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """The positions of packed tokens in the caller's [rows, columns].

    Attributes:
        shape: (rows, columns).
        indices: int64 [T], each slot's index in the flattened rows and columns, rows · columns for a padding slot; None
            if the caller's only row is the packed tokens in order.
        has_padding_slots: Whether there may be padding slots.
    """

    shape: tuple[int, int]
    indices: Tensor | None
    has_padding_slots: bool = False

    @classmethod
    def of(cls, sequences: Sequences, columns: int) -> Layout:
        """Return the layout of one sequence per row; no sequence may be longer than `columns`."""
        rows = len(sequences)
        indices = sequences.sequence_index * columns + sequences.position
        return cls((rows, columns), torch.where(sequences.is_token, indices, rows * columns), True)

    def unpad(self, values: Tensor, name: str, fill: float = 0.0) -> Tensor:
        """Remove padding: [rows, columns, …] -> [T, …], with `fill` in padding slots."""
        if values.shape[:2] != self.shape:
            raise ValueError(f"{name} must begin with shape {list(self.shape)}, got {list(values.shape)}")
        values = values.flatten(0, 1)
        if self.indices is None:
            return values
        if self.has_padding_slots:
            values = torch.cat([values, values.new_full((1, *values.shape[1:]), fill)])
        return values[self.indices]

    def unpad_ids(self, values: Tensor, name: str) -> Tensor:
        """Remove padding from ids of a shape that broadcasts to [rows, columns]."""
        try:
            values = values.expand(self.shape)
        except RuntimeError:
            raise ValueError(f"{name} {list(values.shape)} does not broadcast to {list(self.shape)}") from None
        return self.unpad(values, name)

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """Restore padding: [T, …] -> [rows, columns, …], with `fill` at the caller's padding."""
        if self.indices is None:
            return values.unsqueeze(0)
        size = self.shape[0] * self.shape[1]
        # Padding slots are written after the last row, which is cut off.
        padded = values.new_full((size + self.has_padding_slots, *values.shape[1:]), fill)
        return torch.unflatten(padded.index_copy(0, self.indices, values)[:size], 0, self.shape)

    def slots(self) -> Tensor:
        """Return the slot of each element of the flattened rows and columns, -1 at padding: int64 [rows · columns]."""
        assert self.indices is not None, "packed input has no padding"
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
    positions: int | None,
    padding_index: int | None = None,
    training: bool = False,
    pooled: bool = True,
    pool_last: bool = False,
    bucketed: bool = False,
) -> tuple[Packed, Layout]:
    """Gather the attended tokens of a padded batch [B, L], or take a packed one [1, T] with `cu_seq_lens_q` as it is.

    Args:
        input_ids: int [B, L]; None with `inputs_embeds`.
        attention_mask: [B, L], nonzero at attended tokens; None: all of them.
        token_type_ids, position_ids: int, of a shape that broadcasts to [B, L]; None: zeros, and 0, 1, … in each row.
        inputs_embeds: [B, L, H]; None with `input_ids`.
        cu_seq_lens_q: int [S + 1], the start of each sequence of a packed batch, and the end.
        max_length_q: Bound on the lengths of a packed batch; None: their maximum on a CPU, else tokens or positions.
        positions: Number of rows of the model's position table; None: it has none, and knows any position.
        padding_index: See `_default_positions`.
        training: Whether to draw a seed for dropout.
        pooled: Whether column 0 of every row will be read, even where it is masked out.
        pool_last: Whether a sequence's last token is pooled, as in a causal model.
        bucketed: Whether to add padding slots up to one of few numbers of tokens, see `sequences.bucket`.

    Returns:
        The packed tokens, and the layout that restores padding.

    Raises:
        ValueError: The inputs have other shapes, or more tokens in a row than there are positions.
    """
    tokens = _tokens(input_ids, inputs_embeds)
    if cu_seq_lens_q is not None:
        limit = tokens.shape[1] if position_ids is not None or positions is None else min(tokens.shape[1], positions)
        layout, sequences, masked_starts = _from_cu_seqlens(tokens, attention_mask, cu_seq_lens_q, max_length_q, limit)
    else:
        layout, sequences, masked_starts = _from_mask(tokens, attention_mask, pooled, bucketed)
    if position_ids is None:
        slot_positions = _default_positions(input_ids, padding_index, sequences, layout, positions)
    else:
        slot_positions = layout.unpad_ids(position_ids, "position_ids")
    types = None if token_type_ids is None else layout.unpad_ids(token_type_ids, "token_type_ids")
    return Packed(
        token_ids=None if input_ids is None else layout.unpad(input_ids, "input_ids"),
        embeddings=None if inputs_embeds is None else layout.unpad(inputs_embeds, "inputs_embeds"),
        token_type_ids=torch.zeros_like(slot_positions) if types is None else types,
        position_ids=slot_positions,
        sequences=sequences,
        first=_pooled_slots(sequences, pool_last, masked_starts),
        query_only=0 if masked_starts is None else len(sequences),
        rng=_rng_coordinates(sequences, masked_starts is not None) if training else None,
    ), layout


def pad_packed(inputs: dict[str, Tensor], cu_seq_lens_q: Tensor) -> tuple[dict[str, Tensor], Layout]:
    """Turn packed input into a padded batch, one sequence per row.

    Args:
        inputs: Tensors [1, T, …] or [T], by name.
        cu_seq_lens_q: int [S + 1], see `unpad`.

    Returns:
        The inputs [S, L, …], with an `attention_mask`, and the layout that unpads outputs. Waits for a GPU, once.
    """
    rows = {name: values if values.dim() == 1 else values[0] for name, values in inputs.items()}
    tokens = next(iter(rows.values()))
    sequences = Sequences.from_cu_seqlens(cu_seq_lens_q.to(tokens.device), capacity=len(tokens))
    layout = Layout.of(sequences, sequences.max_seqlen)
    padded = {name: layout.pad(values) for name, values in rows.items()}
    return padded | {"attention_mask": layout.pad(sequences.is_token.long())}, layout


def require_same_packing(q: Tensor | None, k: Tensor | None) -> None:
    """Raise ValueError for packed input whose `cu_seq_lens_q` and `cu_seq_lens_k` are not the same sequences."""
    if k is None or q is k:
        return
    if q is None:
        raise ValueError("packed input has cu_seq_lens_k without cu_seq_lens_q: pass both, they are equal")
    if q.shape != k.shape or (q.is_cpu and k.is_cpu and not torch.equal(q, k)):
        raise ValueError("packed input has a cu_seq_lens_k other than its cu_seq_lens_q: pass the same for both")


def _tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Return the token ids of a call, or the embeddings that it has instead.

    Raises:
        ValueError: It has both or neither, or one of another shape.
    """
    if input_ids is not None and inputs_embeds is None:
        tokens, rule, dims = input_ids, "input_ids must have shape [batch, length]", 2
    elif inputs_embeds is not None and input_ids is None:
        tokens, rule, dims = inputs_embeds, "inputs_embeds must have shape [batch, length, hidden]", 3
    else:
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    if tokens.dim() != dims or 0 in tokens.shape:
        raise ValueError(f"{rule}, none of them 0, got {list(tokens.shape)}")
    return tokens


def _default_positions(
    input_ids: Tensor | None, padding_index: int | None, sequences: Sequences, layout: Layout, rows: int | None
) -> Tensor:
    """Return the positions of slots, int64 [T], for tokens without `position_ids`.

    They are columns if `padding_index` is None. Else they count a sequence's tokens from padding_index + 1 and skip
    those of this id, which have it as their position, as in RoBERTa; with `inputs_embeds` they count all columns.

    Raises:
        ValueError: A sequence has more tokens than the table of `rows` rows, if there is one, has positions for them.
    """
    limit = sys.maxsize if rows is None else rows if padding_index is None else rows - padding_index - 1
    is_packed = layout.indices is None
    length = sequences.max_seqlen_bound if is_packed else layout.shape[1]
    if input_ids is None or padding_index is None:
        columns = sequences.position if layout.indices is None else layout.indices % length
        positions = columns if padding_index is None else columns + padding_index + 1
    else:
        counts = input_ids != padding_index
        before = counts.cumsum(1)
        if is_packed:  # each sequence of the row has its own count
            counts = counts & sequences.is_token
            total = F.pad(counts.cumsum(1)[0], (1, 0))
            before = (total[1:] - total[sequences.cu_seqlens[:-1].long()][sequences.sequence_index])[None]
        all_positions = torch.where(counts, before, 0) + padding_index
        if length > limit:  # padding does not count
            length = 0 if torch.compiler.is_compiling() else int(all_positions.max()) - padding_index
        positions = layout.unpad(all_positions, "input_ids")
    if length > limit:
        raise ValueError(f"{length} tokens in a row are more than the {limit} positions that the model knows")
    return positions


def _pooled_slots(sequences: Sequences, pool_last: bool, masked_starts: Tensor | None) -> Tensor:
    """Return the slot of each sequence's pooled token; where bool [S] `masked_starts` is true, the query-only token."""
    pooled = sequences.last if pool_last else sequences.first
    if masked_starts is None:
        return pooled
    slots = torch.arange(sequences.capacity - len(sequences), sequences.capacity, device=pooled.device)
    return torch.where(masked_starts, slots, pooled)


def _rng_coordinates(sequences: Sequences, has_query_only: bool) -> RngCoordinates:
    ids, position = sequences.token_sequence_ids, sequences.position
    if has_query_only:  # their positions are those after their sequences' last tokens
        rest = sequences.capacity - len(sequences)
        ids = torch.cat([ids[:rest], sequences.sequence_ids])
        position = torch.cat([position[:rest], sequences.cu_seqlens.diff().long()])
    return RngCoordinates(draw_seed(ids.device), ids, position)


def _from_mask(
    tokens: Tensor, mask: Tensor | None, pooled: bool, bucketed: bool
) -> tuple[Layout, Sequences, Tensor | None]:
    """Find the tokens of a padded batch; the last result is bool [B], which rows need a query-only token, if any do."""
    (rows, columns), device = tokens.shape[:2], tokens.device
    size, ids = rows * columns, torch.arange(rows, device=device)
    if mask is None and bucketed:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=device)
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
        # Reading these waits for the device, once.
        num_tokens, any_masked = torch.stack([lengths.sum(), starts_masked.any()]).tolist()
        has_query_only = pooled and bool(any_masked)
        query_only = rows * has_query_only
        slots = bucket(num_tokens + query_only) - query_only if bucketed else num_tokens
        has_padding_slots = has_query_only or slots > num_tokens
        # Each attended position, flattened, is written to its slot; the others are written after the last slot.
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
    tokens: Tensor, mask: Tensor | None, cu_seq_lens: Tensor, max_length: int | None, limit: int
) -> tuple[Layout, Sequences, None]:
    """Take a packed batch; `limit` bounds its lengths if `max_length` is None and reading them would wait for a GPU."""
    if tokens.shape[0] != 1:
        raise ValueError(f"packed input with cu_seq_lens_q must have shape [1, tokens], got {list(tokens.shape)}")
    if mask is not None:
        rule = "packed input with cu_seq_lens_q takes no attention_mask: leave the padding out instead"
        require(mask.all(), rule, lambda: mask.min())
    bound = max_length if isinstance(max_length, int) else None
    if bound is None and not is_readable(cu_seq_lens):
        bound = limit
    cu_seq_lens = cu_seq_lens.to(tokens.device, non_blocking=True)
    sequences = Sequences.from_cu_seqlens(cu_seq_lens, capacity=tokens.shape[1], max_seqlen_bound=bound)
    return Layout((1, tokens.shape[1]), None), sequences, None
