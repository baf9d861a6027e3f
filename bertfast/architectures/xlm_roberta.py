"""XLM-RoBERTa (Conneau et al., 2020): RoBERTa on a hundred languages."""

from __future__ import annotations

from bertfast.architectures.roberta import like_roberta

XLM_ROBERTA = like_roberta("xlm-roberta", "XLMRoberta")
