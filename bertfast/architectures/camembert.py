"""CamemBERT (Martin et al., 2020): RoBERTa on French."""

from __future__ import annotations

from bertfast.architectures.roberta import like_roberta

CAMEMBERT = like_roberta("camembert", "Camembert")
