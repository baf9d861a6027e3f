"""The nine classes of `transformers`, patched when they are made, for what wants a `PreTrainedModel`.

    from bertfast.transformers import BertForMaskedLM  # in place of: from transformers import BertForMaskedLM

Each is `transformers`' own class after `bertfast.patch`: Trainer, pipelines, PEFT and `save_pretrained` know it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from bertfast.patching import patch

__all__ = [
    "BertForMaskedLM",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertLMHeadModel",
    "BertModel",
    "PaddingFreeCollator",
]


class _Patched:
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        patch(self)


class BertModel(_Patched, transformers.BertModel):
    """`transformers.BertModel`, patched."""


class BertForPreTraining(_Patched, transformers.BertForPreTraining):
    """`transformers.BertForPreTraining`, patched."""


class BertForMaskedLM(_Patched, transformers.BertForMaskedLM):
    """`transformers.BertForMaskedLM`, patched."""


class BertLMHeadModel(_Patched, transformers.BertLMHeadModel):
    """`transformers.BertLMHeadModel`, patched."""


class BertForNextSentencePrediction(_Patched, transformers.BertForNextSentencePrediction):
    """`transformers.BertForNextSentencePrediction`, patched."""


class BertForSequenceClassification(_Patched, transformers.BertForSequenceClassification):
    """`transformers.BertForSequenceClassification`, patched."""


class BertForMultipleChoice(_Patched, transformers.BertForMultipleChoice):
    """`transformers.BertForMultipleChoice`, patched."""


class BertForTokenClassification(_Patched, transformers.BertForTokenClassification):
    """`transformers.BertForTokenClassification`, patched."""


class BertForQuestionAnswering(_Patched, transformers.BertForQuestionAnswering):
    """`transformers.BertForQuestionAnswering`, patched."""


@dataclass
class PaddingFreeCollator:
    """A batch without padding, for a patched model in a Trainer: the samples end to end, and where each begins.

    A sample's labels may be one number (classes, or values to regress), a list as long as its tokens, or a list of
    yes and no, one for each of several labels: `of_tokens` says which a list is; none: by its length.

    Gives input_ids and, where the samples have them, token_type_ids and labels of tokens, all int64 [1, T]; labels of
    sequences [S] or [S, labels]; position_ids int64 [1, T]; cu_seq_lens_q and cu_seq_lens_k int32 [S + 1];
    max_length_q and max_length_k.
    """

    of_tokens: bool | None = None

    def __call__(self, samples: Sequence[dict]) -> dict[str, Tensor | int]:
        unknown = {"start_positions", "end_positions"} & samples[0].keys()
        if unknown:
            raise ValueError("the head for answers of transformers takes padded batches alone: use a padding collator")
        lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
        ends = lengths.cumsum(0)
        starts = torch.cat([ends.new_zeros(1), ends]).int()
        longest = int(lengths.max())
        batch = {
            name: torch.cat([torch.as_tensor(sample[name]) for sample in samples])[None]
            for name in ("input_ids", "token_type_ids")
            if name in samples[0]
        }
        batch["position_ids"] = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
        batch |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
        name = next((name for name in ("labels", "label") if name in samples[0]), None)
        if name is not None:
            labels = [torch.as_tensor(sample[name]) for sample in samples]
            fits = all(own.dim() and len(own) == length for own, length in zip(labels, lengths, strict=True))
            of_tokens = fits if self.of_tokens is None else self.of_tokens
            batch["labels"] = torch.cat(labels)[None] if of_tokens else torch.stack(labels)
        return batch
