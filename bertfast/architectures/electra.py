"""ELECTRA (Clark et al., 2020): BERT whose embeddings may be narrower than its layers, without a pooler."""

from __future__ import annotations

from dataclasses import replace

from bertfast.architectures.bert import BERT

ELECTRA = replace(
    BERT,
    model_type="electra",
    module="transformers.models.electra.modeling_electra",
    prefix="Electra",
    classes={
        "embeddings": ["ElectraEmbeddings"],
        "layer": ["ElectraLayer"],
        "encoder": ["ElectraModel"],
        "transform": ["ElectraGeneratorPredictions"],
        "masked_lm": ["ElectraForMaskedLM"],
        "head": ["ElectraForPreTraining", "ElectraForCausalLM", "ElectraForQuestionAnswering"],
        "first_token": ["ElectraForSequenceClassification", "ElectraForMultipleChoice"],
        "mean_loss": ["ElectraForTokenClassification"],
    },
    width="embedding_size",
    projection="embeddings_project",
    output="BaseModelOutputWithPastAndCrossAttentions",
    first_token_readers={
        "ElectraForSequenceClassification": "classifier",
        "ElectraForMultipleChoice": "sequence_summary",
    },
    tasks={
        **BERT.tasks,
        "ForSequenceClassification": (
            "classifier.dropout",
            "classifier.dense",
            "classifier.activation",
            "classifier.dropout",
            "classifier.out_proj",
        ),
        "ForMultipleChoice": (
            "sequence_summary.first_dropout",
            "sequence_summary.summary",
            "sequence_summary.activation",
            "sequence_summary.last_dropout",
            "classifier",
        ),
    },
    head={"transform": "generator_predictions", "decoder": "generator_lm_head"},
    head_containers=(),
    transform={"dense": "dense", "activation": "activation", "norm": "LayerNorm"},
    other_heads=["discriminator_predictions"],
    pretraining_output=None,
)
