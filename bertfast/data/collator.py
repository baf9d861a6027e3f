"""Batches without padding for transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class PaddingFreeCollator:
    """Collate samples into a batch without padding, for a fused model: sequences end to end, and where each begins.

    A sample's labels may be one number (classes, or values to regress), a list as long as its tokens, or a list of
    yes and no, one for each of several labels. Where a sample has an `attention_mask`, tokens that it masks out are
    left out, and so are their labels.

    Args:
        tokenizer: Accepted so that the collator stands where another one did; nothing is padded, so it is not used.
        of_tokens: Whether a list of labels has one for each token; None: decided by its length.

    Returns:
        Of a call: input_ids and, where the samples have them, token_type_ids and labels of tokens, all int64 [1, T];
        labels of sequences [S] or [S, labels]; next_sentence_label int64 [S]; position_ids int64 [1, T];
        cu_seq_lens_q and cu_seq_lens_k int32 [S + 1]; max_length_q and max_length_k.
    """

    tokenizer: Any = None
    _: KW_ONLY
    of_tokens: bool | None = None

    def __call__(self, samples: Sequence[dict]) -> dict[str, Tensor | int]:
        unknown = {"start_positions", "end_positions"} & samples[0].keys()
        if unknown:
            raise ValueError(
                f"PaddingFreeCollator takes no {', '.join(sorted(unknown))}: question answering needs padded batches, "
                "so use transformers.DataCollatorWithPadding"
            )
        ids = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        attended = [
            torch.as_tensor(sample.get("attention_mask", torch.ones_like(own))) != 0
            for sample, own in zip(samples, ids, strict=True)
        ]
        lengths = torch.stack([mask.sum() for mask in attended])
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        longest = int(lengths.max())
        batch: dict[str, Tensor | int] = {
            name: _joined([torch.as_tensor(sample[name]) for sample in samples], attended)
            for name in ("input_ids", "token_type_ids")
            if name in samples[0]
        }
        batch["position_ids"] = torch.cat([mask.nonzero().squeeze(1) for mask in attended])[None]
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        if "next_sentence_label" in samples[0]:
            batch["next_sentence_label"] = torch.tensor([int(sample["next_sentence_label"]) for sample in samples])
        name = next((name for name in ("labels", "label") if name in samples[0]), None)
        if name is not None:
            batch["labels"] = self._labels([torch.as_tensor(sample[name]) for sample in samples], attended)
        return batch

    def _labels(self, labels: list[Tensor], attended: list[Tensor]) -> Tensor:
        fits = all(own.dim() and len(own) == len(mask) for own, mask in zip(labels, attended, strict=True))
        if fits if self.of_tokens is None else self.of_tokens:
            return _joined(labels, attended)
        return torch.stack(labels)


def _joined(values: list[Tensor], attended: list[Tensor]) -> Tensor:
    return torch.cat([own[mask] for own, mask in zip(values, attended, strict=True)])[None]
