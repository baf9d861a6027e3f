"""DistilBERT (Sanh et al., 2019): BERT without token types, pooler and dropout after the attention."""

from __future__ import annotations

from bertfast.architectures.architecture import Architecture
from bertfast.architectures.supported_versions import IS_TRANSFORMERS_4

DISTILBERT = Architecture(
    model_type="distilbert",
    module="transformers.models.distilbert.modeling_distilbert",
    prefix="DistilBert",
    classes={
        "embeddings": ["Embeddings"],
        "layer": ["TransformerBlock"],
        "encoder": ["DistilBertModel"],
        "masked_lm": ["DistilBertForMaskedLM"],
        "head": ["DistilBertForQuestionAnswering"],
        "first_token": ["DistilBertForSequenceClassification", "DistilBertForMultipleChoice"],
        "mean_loss": ["DistilBertForTokenClassification"],
    },
    embeddings="embeddings",
    stack="transformer",
    layers="transformer.layer",
    embedding={
        "token_embeddings": "word_embeddings",
        "position_embeddings": "position_embeddings",
        "norm": "LayerNorm",
        "dropout": "dropout",
    },
    layer={
        "query": "attention.q_lin",
        "key": "attention.k_lin",
        "value": "attention.v_lin",
        "attention_dense": "attention.out_lin",
        "attention_norm": "sa_layer_norm",
        "intermediate_dense": "ffn.lin1",
        "output_dense": "ffn.lin2",
        "output_norm": "output_layer_norm",
        "activation": "ffn.activation",
        "heads": "attention.n_heads",
        "scale": "attention.scaling" if not IS_TRANSFORMERS_4 else None,
        "causal": "attention.is_causal",
        "attention_dropout": "attention.dropout",
        "attention_output_dropout": None,
        "output_dropout": "ffn.dropout",
    },
    sizes={"max_position_embeddings": "position_embeddings"},
    width="dim",
    default_inputs={"position_ids": 1},
    output="BaseModelOutput",
    first_token_readers={"DistilBertForSequenceClassification": "", "DistilBertForMultipleChoice": ""},
    tasks={
        "ForSequenceClassification": ("pre_classifier", "relu", "dropout", "classifier"),
        "ForMultipleChoice": ("pre_classifier", "relu", "dropout", "classifier"),
        "ForTokenClassification": ("dropout", "classifier"),
        "ForQuestionAnswering": ("dropout", "qa_outputs"),
    },
    head={"transform": "", "decoder": "vocab_projector"},
    head_containers=(),
    transform={"dense": "vocab_transform", "activation": "activation", "norm": "vocab_layer_norm"},
    loss="mlm_loss_fct",
    config_names={
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
)
