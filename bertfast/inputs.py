"""From the arguments of a Hugging Face BERT, padded or packed, to packed tokens; and back for what it returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bertfast.dropout import TokenIdentity
from bertfast.sequences import Sequences


@dataclass(frozen=True, eq=False)
class Packed:
    """What the encoder takes: T packed tokens of S sequences.

    Attributes:
        token_ids: int [T], or None where `embeddings` [T, H] are given instead.
        token_type_ids, position_ids: int [T].
        sequences: which token belongs where.
        first: int64 [S], the row that speaks for each sequence: its [CLS].
        guests: sequence of each guest, a token that asks in its sequence without being asked; guests stand at the
            slots from `sequences.num_tokens` on. A padded batch has one where [CLS] is masked out.
        identity: who the tokens are to dropout; None where nothing is dropped.
    """

    token_ids: Tensor | None
    embeddings: Tensor | None
    token_type_ids: Tensor
    position_ids: Tensor
    sequences: Sequences
    first: Tensor
    guests: tuple[int, ...] = ()
    identity: TokenIdentity | None = None


@dataclass(frozen=True, eq=False)
class Layout:
    """How the caller's [rows, columns] lie in the packed tokens: at `places` of its flattened form, or all in order."""

    shape: tuple[int, int]
    indices: Tensor | None

    @classmethod
    def of(cls, sequences: Sequences) -> Layout:
        """One sequence a row, as many columns as the longest has tokens."""
        places = sequences.sequence_index * sequences.max_seqlen + sequences.position
        return cls((len(sequences.lengths), sequences.max_seqlen), places[: sequences.num_tokens])

    def unpad(self, values: Tensor, name: str) -> Tensor:
        """[rows, columns, …] -> [T, …]."""
        if values.shape[:2] != self.shape:
            raise ValueError(f"{name} must begin with shape {list(self.shape)}, got {list(values.shape)}")
        values = values.flatten(0, 1)
        return values if self.indices is None else values[self.indices]

    def pad(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[T, …] -> [rows, columns, …], `fill` where the caller has padding."""
        if self.indices is None:
            return values.unsqueeze(0)
        padded = values.new_full((self.shape[0] * self.shape[1], *values.shape[1:]), fill)
        return padded.index_copy(0, self.indices, values[: len(self.indices)]).unflatten(0, self.shape)

    def slots(self) -> Tensor:
        """int64 [rows · columns]: where in the packed tokens each element of the flattened input is, -1 at padding."""
        slots = self.indices.new_full((self.shape[0] * self.shape[1],), -1)
        return slots.index_copy(0, self.indices, torch.arange(len(self.indices), device=slots.device))


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout from torch's generator: int64 [], replayed with it by activation checkpointing."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def unpad(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    positions: int,
    training: bool = False,
    pooled: bool = True,
    pool_last: bool = False,
) -> tuple[Packed, Layout]:
    """Pack a padded batch [B, L] at its attended places, or take a packed one [1, T] with `cu_seq_lens_q` as it is.

    `positions` is how many the model knows. `pooled` says that column 0 of every row will be read, also where it is
    masked out. `pool_last`: a sequence's last token speaks for it, as where a model reads from left to right.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    given, wanted = (input_ids, "input_ids must have shape [batch, length]")
    if given is None:
        given, wanted = (inputs_embeds, "inputs_embeds must have shape [batch, length, hidden]")
    if given.dim() != wanted.count(",") + 1 or 0 in given.shape:
        raise ValueError(f"{wanted}, none of them 0, got {list(given.shape)}")
    if cu_seq_lens_q is None:
        layout, sequences, guests = _from_mask(given, attention_mask, pooled)
        columns, longest = layout.indices % layout.shape[1], layout.shape[1]
    else:
        layout, sequences = _from_cu_seqlens(given, attention_mask, cu_seq_lens_q)
        columns, longest, guests = sequences.position, sequences.max_seqlen, []
    if position_ids is None and longest > positions:
        raise ValueError(f"{longest} tokens in a row are more than the {positions} positions that the model knows")

    def unpad_or(values: Tensor | None, name: str, default: Tensor | None) -> Tensor | None:
        if values is None:
            return default
        one_row_for_all = values.shape == (1, layout.shape[1])
        return layout.unpad(values.expand(layout.shape) if one_row_for_all else values, name)

    first = sequences.last if pool_last else sequences.first
    identity = None
    if training:
        identity = TokenIdentity(draw_seed(given.device), sequences.token_sequence_ids, sequences.position)
    if guests:  # they have a row that speaks for the sequence, and the position behind its last token
        rows = torch.tensor(guests, dtype=torch.int64, device=given.device)
        places = torch.arange(sequences.num_tokens, sequences.num_tokens + len(guests), device=given.device)
        first = first.index_copy(0, rows, places)
        identity = identity and TokenIdentity(
            identity.seed,
            identity.sequence_number.index_copy(0, places, sequences.sequence_ids[rows]),
            identity.position.index_copy(0, places, sequences.cu_seqlens.diff().long()[rows]),
        )
    packed = Packed(
        token_ids=unpad_or(input_ids, "input_ids", None),
        embeddings=unpad_or(inputs_embeds, "inputs_embeds", None),
        token_type_ids=unpad_or(token_type_ids, "token_type_ids", torch.zeros_like(columns)),
        position_ids=unpad_or(position_ids, "position_ids", columns),
        sequences=sequences,
        first=first,
        guests=tuple(guests),
        identity=identity,
    )
    return packed, layout


def _from_mask(given: Tensor, mask: Tensor | None, pooled: bool) -> tuple[Layout, Sequences, list[int]]:
    shape = tuple(given.shape[:2])
    if mask is None:
        places = torch.arange(shape[0] * shape[1], device=given.device)
        return Layout(shape, places), Sequences.from_lengths([shape[1]] * shape[0], device=given.device), []
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask must have shape {list(shape)} like the input, got {list(mask.shape)}; "
            "masks between pairs of tokens are not supported"
        )
    attended = mask != 0
    lengths, begins = torch.stack([attended.sum(1), attended[:, 0]]).tolist()  # the device is asked once
    guests = [row for row, begun in enumerate(begins) if pooled and not begun]
    places = attended.flatten().nonzero().squeeze(1)
    if guests:
        places = torch.cat([places, torch.tensor(guests, device=places.device) * shape[1]])
    sequences = Sequences.from_lengths(lengths, capacity=len(places), device=given.device)
    return Layout(shape, places), sequences, guests


def _from_cu_seqlens(given: Tensor, mask: Tensor | None, cu_seq_lens: Tensor) -> tuple[Layout, Sequences]:
    if given.shape[0] != 1:
        raise ValueError(f"packed input with cu_seq_lens_q must have shape [1, tokens], got {list(given.shape)}")
    if mask is not None and not bool(mask.all()):
        raise ValueError("packed input with cu_seq_lens_q takes no attention_mask: leave the padding out instead")
    sequences = Sequences.from_cu_seqlens(cu_seq_lens.to(given.device), capacity=given.shape[1])
    return Layout((1, given.shape[1]), None), sequences
