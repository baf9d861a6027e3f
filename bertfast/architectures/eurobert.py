"""EuroBERT (Boizard et al., 2025): pre-norm with RMSNorm, rotary positions, SwiGLU and grouped-query attention."""

from __future__ import annotations

from bertfast.architectures.architecture import Architecture

EUROBERT = Architecture(
    model_type="eurobert",
    module="transformers.models.eurobert.modeling_eurobert",
    prefix="EuroBert",
    classes={
        "layer": ["EuroBertDecoderLayer"],
        "encoder": ["EuroBertModel"],
        "masked_lm": ["EuroBertForMaskedLM"],
        "first_token": ["EuroBertForSequenceClassification"],
        "mean_loss": ["EuroBertForTokenClassification"],
    },
    embeddings="embed_tokens",
    stack="",
    layers="layers",
    embedding={},
    layer={
        "query": "self_attn.q_proj",
        "key": "self_attn.k_proj",
        "value": "self_attn.v_proj",
        "attention_dense": "self_attn.o_proj",
        "attention_norm": "input_layernorm",
        "gate_dense": "mlp.gate_proj",
        "up_dense": "mlp.up_proj",
        "output_dense": "mlp.down_proj",
        "output_norm": "post_attention_layernorm",
        "activation": "mlp.act_fn",
        "head_dimension": "self_attn.head_dim",
        "query_groups": "self_attn.num_key_value_groups",
        "scale": "self_attn.scaling",
        "causal": "self_attn.is_causal",
        "attention_dropout": "self_attn.attention_dropout",
    },
    sizes={},
    default_inputs={},
    output="BaseModelOutput",
    first_token_readers={"EuroBertForSequenceClassification": ""},
    tasks={
        "ForSequenceClassification": ("dense", "activation", "classifier"),
        "ForTokenClassification": ("classifier",),
    },
    head={"decoder": "lm_head"},
    head_containers=(),
    transform={},
    pre_norm=True,
    gated=True,
    final_norm="norm",
    rotary="rotary_emb",
    slices_layers=True,
    pooling="classifier_pooling",
    config_names={"layer_norm_eps": "rms_norm_eps", "attention_probs_dropout_prob": "attention_dropout"},
)
