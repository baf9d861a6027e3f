"""BERT (Devlin et al., 2019), as transformers has it from 4.57 on."""

from __future__ import annotations

import transformers

from bertfast.architectures.architecture import Architecture

BERT = Architecture(
    model_type="bert",
    module="transformers.models.bert.modeling_bert",
    embeddings="embeddings",
    stack="encoder",
    layers="encoder.layer",
    embedding={
        "words": "word_embeddings",
        "positions": "position_embeddings",
        "token_types": "token_type_embeddings",
        "norm": "LayerNorm",
        "dropout": "dropout",
    },
    layer={
        "query": "attention.self.query",
        "key": "attention.self.key",
        "value": "attention.self.value",
        "attention_dense": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "intermediate_dense": "intermediate.dense",
        "output_dense": "output.dense",
        "output_norm": "output.LayerNorm",
        "activation": "intermediate.intermediate_act_fn",
        "heads": "attention.self.num_attention_heads",
        "scale": "attention.self.scaling" if transformers.__version__ >= "5" else None,
        "causal": "attention.self.is_decoder",
        "attention_dropout": "attention.self.dropout",
        "attention_output_dropout": "attention.output.dropout",
        "output_dropout": "output.dropout",
    },
    default_inputs=("token_type_ids", "position_ids"),
    transform={"dense": "dense", "activation": "transform_act_fn", "norm": "LayerNorm"},
    head={
        "transform": "cls.predictions.transform",
        "decoder": "cls.predictions.decoder",
        "next_sentence": "cls.seq_relationship",
    },
    head_containers=("cls", "cls.predictions"),
    pretraining_output="BertForPreTrainingOutput",
)
