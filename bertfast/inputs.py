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
            places `sequences.used`, `sequences.used + 1`, … A padded batch has one where [CLS] is masked out.
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
    places: Tensor | None
    used: int

    @classmethod
    def of(cls, sequences: Sequences) -> Layout:
        """One sequence a row, as many columns as the longest has tokens."""
        places = sequences.token_index * sequences.longest + sequences.position
        return cls((len(sequences.lengths), sequences.longest), places[: sequences.used], sequences.used)

    def pack(self, values: Tensor, name: str) -> Tensor:
        """[rows, columns, …] -> [used, …]."""
        if values.shape[:2] != self.shape:
            raise ValueError(f"{name} must begin with shape {list(self.shape)}, got {list(values.shape)}")
        values = values.flatten(0, 1)
        return values[: self.used] if self.places is None else values[self.places]

    def unpack(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[T, …] -> [rows, columns, …], `fill` where the caller has padding."""
        if self.places is None:
            return values.unsqueeze(0)
        padded = values.new_full((self.shape[0] * self.shape[1], *values.shape[1:]), fill)
        return padded.index_copy(0, self.places, values[: self.used]).unflatten(0, self.shape)


def draw_seed(device: torch.device) -> Tensor:
    """A seed for dropout from torch's generator: int64 [], replayed with it by activation checkpointing."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)


def pack(
    input_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    token_type_ids: Tensor | None = None,
    position_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    *,
    cu_seq_lens_q: Tensor | None = None,
    training: bool = False,
    pooled: bool = True,
) -> tuple[Packed, Layout]:
    """Pack a padded batch [B, L] at its attended places, or take a packed one [1, T] with `cu_seq_lens_q` as it is.

    `pooled` says that column 0 of every row will be read, also where it is masked out.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds, and not both")
    given = input_ids if input_ids is not None else inputs_embeds
    if given.dim() != (2 if inputs_embeds is None else 3):
        raise ValueError(
            f"input_ids must have shape [batch, length], inputs_embeds a width besides, got {list(given.shape)}"
        )
    if cu_seq_lens_q is None:
        layout, sequences, guests = _from_mask(given, attention_mask, pooled)
    else:
        layout, sequences = _from_cu_seqlens(given, attention_mask, cu_seq_lens_q)
        guests = []

    guests = tuple(guests)
    sources = _sources(layout, guests, given.device)
    rows, columns = layout.shape
    flat = {
        "input_ids": input_ids,
        "inputs_embeds": inputs_embeds,
        "token_type_ids": token_type_ids if token_type_ids is not None else _zeros(layout.shape, given.device),
        "position_ids": position_ids if position_ids is not None else _positions(layout, sequences),
    }
    for name, values in flat.items():
        if values is not None and values.shape[:2] != layout.shape and tuple(values.shape) != (1, columns):
            raise ValueError(f"{name} must have shape {[rows, columns]}, got {list(values.shape)}")
    token_ids, embeddings, types, positions = (
        None if values is None else values.expand(rows, *values.shape[1:]).flatten(0, 1)[sources]
        for values in flat.values()
    )
    packed = Packed(
        token_ids,
        embeddings,
        types,
        positions,
        sequences,
        _first_rows(sequences, guests),
        guests,
        _identity(sequences, guests) if training else None,
    )
    return packed, layout


def _from_mask(given: Tensor, mask: Tensor | None, pooled: bool) -> tuple[Layout, Sequences, list[int]]:
    rows, columns = given.shape[:2]
    if mask is None:
        lengths = [columns] * rows
        places, guests = torch.arange(rows * columns, device=given.device), []
    else:
        if mask.dim() != 2 or mask.shape != given.shape[:2]:
            raise ValueError(
                f"attention_mask must have shape {[rows, columns]} like the input, got {list(mask.shape)}; "
                "masks between pairs of tokens are not supported"
            )
        attended = mask != 0
        lengths = attended.sum(1).tolist()
        places = attended.flatten().nonzero().squeeze(1)
        guests = (~attended[:, 0]).nonzero().squeeze(1).tolist() if pooled and columns else []
    tokens = sum(lengths) + len(guests)
    sequences = Sequences.from_lengths(lengths, tokens=tokens, device=given.device)
    return Layout((rows, columns), places, sequences.used), sequences, guests


def _from_cu_seqlens(given: Tensor, mask: Tensor | None, cu_seq_lens: Tensor) -> tuple[Layout, Sequences]:
    if given.shape[0] != 1:
        raise ValueError(f"packed input with cu_seq_lens_q must have shape [1, tokens], got {list(given.shape)}")
    if mask is not None and not bool(mask.all()):
        raise ValueError("packed input with cu_seq_lens_q takes no attention_mask: leave the padding out instead")
    sequences = Sequences.from_cu_seqlens(cu_seq_lens.to(given.device), tokens=given.shape[1])
    return Layout((1, given.shape[1]), None, given.shape[1]), sequences


def _sources(layout: Layout, guests: tuple[int, ...], device) -> Tensor | slice:
    # Which places of the flattened input the packed tokens come from; a guest is column 0 of its row.
    if layout.places is None:
        return slice(None)
    return torch.cat([layout.places, torch.tensor(guests, dtype=torch.int64, device=device) * layout.shape[1]])


def _zeros(shape: tuple[int, int], device) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64, device=device)


def _positions(layout: Layout, sequences: Sequences) -> Tensor:
    if layout.places is None:
        return sequences.position[None]
    return torch.arange(layout.shape[1], device=layout.places.device)[None]


def _first_rows(sequences: Sequences, guests: tuple[int, ...]) -> Tensor:
    first = sequences.cu_seqlens[:-1].long().clamp(max=max(sequences.tokens - 1, 0))
    if guests:
        places = range(sequences.used, sequences.used + len(guests))
        first[list(guests)] = torch.tensor(places, device=first.device)
    return first


def _identity(sequences: Sequences, guests: tuple[int, ...]) -> TokenIdentity:
    number, position = sequences.token_number, sequences.position
    if guests:
        number, position = number.clone(), position.clone()
        number[sequences.used :] = sequences.numbers[list(guests)]
        position[sequences.used :] = torch.tensor([sequences.lengths[row] for row in guests], device=position.device)
    return TokenIdentity(draw_seed(position.device), number, position)
