"""NomicBERT (Nussbaum et al., 2024): BERT with rotary positions and gated activations, without biases in its layers."""

from __future__ import annotations

from dataclasses import replace

from bertfast.architectures.bert import BERT

NOMIC_BERT = replace(
    BERT,
    model_type="nomic_bert",
    module="transformers.models.nomic_bert.modeling_nomic_bert",
    prefix="NomicBert",
    classes={
        "embeddings": ["NomicBertEmbeddings"],
        "layer": ["NomicBertLayer"],
        "encoder": ["NomicBertModel"],
        "transform": ["NomicBertPredictionHeadTransform"],
        "masked_lm": ["NomicBertForMaskedLM"],
        "pooled": ["NomicBertForSequenceClassification"],
        "mean_loss": ["NomicBertForTokenClassification"],
    },
    stack="",
    layers="layers",
    embedding={
        "token_embeddings": "word_embeddings",
        "token_type_embeddings": "token_type_embeddings",
        "norm": "LayerNorm",
        "dropout": "dropout",
    },
    layer={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_dense": "self_attn.o_proj",
        "attention_norm": "post_attention_layernorm",
        "gate_dense": "mlp.gate_proj",
        "up_dense": "mlp.up_proj",
        "output_dense": "mlp.down_proj",
        "output_norm": "post_mlp_layernorm",
        "activation": "mlp.act_fn",
        "head_dimension": "self_attn.head_dim",
        "scale": "self_attn.scaling",
        "causal": "self_attn.is_causal",
        "attention_dropout": "self_attn.attention_dropout",
        "attention_output_dropout": "post_attention_dropout",
        "output_dropout": "post_mlp_dropout",
    },
    sizes={"type_vocab_size": "token_type_embeddings"},
    default_inputs={"token_type_ids": 0},
    output="BaseModelOutputWithPooling",
    tasks={
        "ForSequenceClassification": ("pooler", "dropout", "classifier"),
        "ForTokenClassification": ("dropout", "classifier"),
    },
    head={"transform": "cls.predictions.transform", "decoder": "cls.predictions.decoder"},
    transform={"dense": "dense", "activation": "transform_act_fn", "norm": "layer_norm"},
    gated=True,
    rotary="rotary_emb",
    slices_layers=True,
    pretraining_output=None,
)
