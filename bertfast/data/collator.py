"""Batches without padding for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class PaddingFreeCollator:
    """Collate samples into one packed batch for a fused model: sequences end to end, and their boundaries.

    The labels of a sample may be one number (a class or a regression target), one label per token, or one 0 or 1 per
    class (multi-label). Tokens that a sample's `attention_mask` excludes are dropped, and so are their labels.

    Args:
        tokenizer: Unused, because nothing is padded; accepted for compatibility with the collators of transformers.
        token_labels: Whether a list of labels holds one per token; None: it does if it is as long as the tokens.
        model: The fused model that gets the batches. It is required if an `attention_mask` excludes a token before
            others, because BERT counts the positions of such tokens, and RoBERTa does not count padding.

    Returns:
        A call returns input_ids and, if the samples have them, token_type_ids and token labels, int64 [1, T]; sequence
        labels [S] or [S, labels]; next_sentence_label int64 [S]; cu_seq_lens_q and cu_seq_lens_k int32 [S + 1];
        max_length_q and max_length_k int. If an `attention_mask` excludes a token before others, also position_ids
        int64 [1, T], those that the tokens have in a padded batch; else the model counts positions.
    """

    tokenizer: object = None
    _: KW_ONLY
    token_labels: bool | None = None
    model: InitVar[nn.Module | None] = None
    _has_model: bool = field(init=False, repr=False, default=False)
    _padding_index: int | None = field(init=False, repr=False, default=None)

    def __post_init__(self, model: nn.Module | None) -> None:
        # The model itself is not kept, as each worker process of a DataLoader would get a copy.
        if model is not None:
            self._has_model, self._padding_index = True, _padding_index_of(model)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor | int]:
        _check(samples)
        ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        attended = [
            torch.as_tensor(sample.get("attention_mask", torch.ones_like(sample_ids))) != 0
            for sample, sample_ids in zip(samples, ids, strict=True)
        ]
        lengths = torch.stack([mask.sum() for mask in attended])
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        max_seqlen = int(lengths.max())
        batch: dict[str, Tensor | int] = {
            name: _joined([torch.as_tensor(sample[name]) for sample in samples], attended)
            for name in ("input_ids", "token_type_ids")
            if name in samples[0]
        }
        if not all(mask[: int(length)].all() for mask, length in zip(attended, lengths, strict=True)):
            batch["position_ids"] = torch.cat([*map(self._positions, ids, attended)])[None]
        batch |= {
            "cu_seq_lens_q": starts,
            "cu_seq_lens_k": starts,
            "max_length_q": max_seqlen,
            "max_length_k": max_seqlen,
        }
        if "next_sentence_label" in samples[0]:
            batch["next_sentence_label"] = torch.tensor([int(sample["next_sentence_label"]) for sample in samples])
        name = next((name for name in ("labels", "label", "label_ids") if name in samples[0]), None)
        if name is not None:
            batch["labels"] = self._labels([torch.as_tensor(sample[name]) for sample in samples], attended)
        return batch

    def _positions(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the positions of the attended tokens of a sample, int64 [n]."""
        if not self._has_model:
            raise ValueError(
                "PaddingFreeCollator: an attention_mask excludes a token before others, and the positions of those "
                "depend on the model's family: pass PaddingFreeCollator(model=…), the model that gets the batches"
            )
        padding = self._padding_index
        if padding is None:
            return mask.nonzero().squeeze(1)
        counts = ids != padding
        return (torch.where(counts, counts.cumsum(0), 0) + padding)[mask]

    def _labels(self, labels: list[Tensor], attended: list[Tensor]) -> Tensor:
        token_labels = self.token_labels
        if token_labels is None:
            token_labels = all(x.dim() and len(x) == len(mask) for x, mask in zip(labels, attended, strict=True))
        if token_labels:
            return _joined(labels, attended)
        return torch.stack(labels)


def _padding_index_of(model: nn.Module) -> int | None:
    """Return the token id that positions skip in a fused model; None: they count all tokens."""
    encoder: Any = next((module for module in model.modules() if hasattr(module, "padding_index")), None)
    if encoder is None:
        raise ValueError(
            f"PaddingFreeCollator: this {type(model).__name__} holds no fused encoder, and others do not take packed "
            "batches: call bertfast.patch(model) first"
        )
    index: int | None = encoder.padding_index()
    return index


def _check(samples: Sequence[Mapping[str, Any]]) -> None:
    """Refuse samples that cannot be packed, or that differ in what they hold."""
    if not samples:
        raise ValueError("PaddingFreeCollator got no samples")
    unsupported = {"start_positions", "end_positions"} & samples[0].keys()
    if unsupported:
        raise ValueError(
            f"PaddingFreeCollator does not support {', '.join(sorted(unsupported))}: question answering "
            "needs padded batches, so use transformers.DataCollatorWithPadding"
        )
    if "position_ids" in samples[0]:
        raise ValueError("PaddingFreeCollator counts positions itself: leave position_ids out")
    for index, sample in enumerate(samples):
        if sample.keys() != samples[0].keys() or "input_ids" not in sample:
            raise ValueError(
                f"PaddingFreeCollator: sample {index} holds {', '.join(sample) or 'nothing'}, sample 0 holds "
                f"{', '.join(samples[0]) or 'nothing'}: all must hold the same, input_ids among it"
            )
        ids, mask = torch.as_tensor(sample["input_ids"]), sample.get("attention_mask")
        if ids.dim() != 1:
            raise ValueError(
                f"PaddingFreeCollator: input_ids of sample {index} must be a list of token ids, got shape "
                f"{list(ids.shape)}: multiple choice needs padded batches, so use "
                "transformers.DataCollatorForMultipleChoice"
            )
        if mask is not None and len(mask) != len(ids):
            raise ValueError(
                f"PaddingFreeCollator: sample {index} has {len(ids)} input_ids and an attention_mask of {len(mask)}"
            )


def _joined(values: list[Tensor], attended: list[Tensor]) -> Tensor:
    """Return the values of attended tokens end to end, [1, T]."""
    return torch.cat([x[mask] for x, mask in zip(values, attended, strict=True)])[None]
