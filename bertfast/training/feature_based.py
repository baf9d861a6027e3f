"""Feature-based training: the frozen encoder's hidden states, stored on disk, are the inputs of the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from bertfast.inference.embed import cached_hidden_states
from bertfast.models.extensions import BertFeaturesForTokenClassification, warn_of_few_layers
from bertfast.tasks.features import Features
from bertfast.training.finetune_folder import SCRATCH
from bertfast.training.finetune_settings import FinetuneSettings


def replace_inputs_by_states(
    features: dict[str, Features], model: PreTrainedModel, settings: FinetuneSettings, precision: str
) -> None:
    """Make the hidden states of the encoder the inputs of all examples.

    Args:
        features: Tokenized examples by split; replaced by those with hidden states.
        model: The model, of which the encoder is frozen.
        settings: Settings of the run.
        precision: Precision of the encoder.
    """
    assert isinstance(model, BertFeaturesForTokenClassification)
    warn_of_few_layers("--feature-layers", settings.feature_based.feature_layers, model.config)
    folder = Path(settings.feature_based.features_dir or Path(settings.output_dir, SCRATCH))
    tokens = settings.compute.tokens_per_batch(model.device)
    for split, tokenized in features.items():
        states = cached_hidden_states(folder, model, tokenized, precision, tokens)
        features[split] = replace(tokenized, inputs={"features": states})
