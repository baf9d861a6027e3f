"""RoBERTa (Liu et al., 2019): BERT without next-sentence head, whose positions skip padding."""

from __future__ import annotations

from dataclasses import replace

from bertfast.architectures.architecture import Architecture
from bertfast.architectures.bert import BERT


def like_roberta(model_type: str, prefix: str) -> Architecture:
    """Return the adapter of a family whose classes are RoBERTa's under other names.

    Args:
        model_type: As in a configuration.
        prefix: What the names of its classes begin with.
    """
    module = model_type.replace("-", "_")
    return replace(
        BERT,
        model_type=model_type,
        module=f"transformers.models.{module}.modeling_{module}",
        prefix=prefix,
        classes={
            "embeddings": [f"{prefix}Embeddings"],
            "layer": [f"{prefix}Layer"],
            "encoder": [f"{prefix}Model"],
            "masked_lm": [f"{prefix}ForMaskedLM"],
            "head": [f"{prefix}ForCausalLM", f"{prefix}ForQuestionAnswering"],
            "first_token": [f"{prefix}ForSequenceClassification"],
            "pooled": [f"{prefix}ForMultipleChoice"],
            "mean_loss": [f"{prefix}ForTokenClassification"],
        },
        padding_index="embeddings.padding_idx",
        default_inputs={"token_type_ids": 0},
        first_token_readers={f"{prefix}ForSequenceClassification": "classifier"},
        tasks={
            **BERT.tasks,
            "ForSequenceClassification": (
                "classifier.dropout",
                "classifier.dense",
                "tanh",
                "classifier.dropout",
                "classifier.out_proj",
            ),
        },
        head={"transform": "lm_head", "decoder": "lm_head.decoder"},
        head_containers=("lm_head",),
        transform={"dense": "dense", "norm": "layer_norm"},
        pretraining_output=None,
    )


ROBERTA = like_roberta("roberta", "Roberta")
