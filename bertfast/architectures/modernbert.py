"""ModernBERT (Warner et al., 2024): pre-norm, rotary positions, gated activations, windows in two of three layers."""

from __future__ import annotations

from bertfast.architectures.architecture import Architecture

_HEAD = ("head", "drop", "classifier")

MODERNBERT = Architecture(
    model_type="modernbert",
    module="transformers.models.modernbert.modeling_modernbert",
    prefix="ModernBert",
    classes={
        "embeddings": ["ModernBertEmbeddings"],
        "layer": ["ModernBertEncoderLayer"],
        "encoder": ["ModernBertModel"],
        "transform": ["ModernBertPredictionHead"],
        "masked_lm": ["ModernBertForMaskedLM"],
        "head": ["ModernBertForQuestionAnswering"],
        "first_token": ["ModernBertForSequenceClassification"],
        # Its choices are pooled at the first token that the mask does not exclude, not at the first column.
        "mean_loss": ["ModernBertForTokenClassification", "ModernBertForMultipleChoice"],
    },
    embeddings="embeddings",
    stack="",
    layers="layers",
    embedding={"token_embeddings": "tok_embeddings", "norm": "norm", "dropout": "drop"},
    layer={
        "qkv": "attn.Wqkv",
        "attention_dense": "attn.Wo",
        "attention_norm": "attn_norm",
        "gate_dense": "mlp.Wi",
        "output_dense": "mlp.Wo",
        "output_norm": "mlp_norm",
        "activation": "mlp.act",
        "head_dimension": "attn.head_dim",
        "scale": None,
        "causal": "attn.is_causal",
        "window": "config.sliding_window",
        "attention_dropout": "attn.attention_dropout",
        "attention_output_dropout": "attn.out_drop",
        "intermediate_dropout": "mlp.drop",
    },
    sizes={},
    default_inputs={},
    output="BaseModelOutput",
    first_token_readers={"ModernBertForSequenceClassification": ""},
    tasks={
        "ForSequenceClassification": _HEAD,
        "ForMultipleChoice": _HEAD,
        "ForTokenClassification": _HEAD,
        "ForQuestionAnswering": _HEAD,
    },
    head={"transform": "head", "decoder": "decoder"},
    head_containers=(),
    transform={"dense": "dense", "activation": "act", "norm": "norm"},
    pre_norm=True,
    gated=True,
    final_norm="final_norm",
    rotary="rotary_emb",
    layer_type="attention_type",
    pooling="config.classifier_pooling",
    config_names={
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
)
