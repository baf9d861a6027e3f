"""BERT (Devlin et al., 2019), as transformers has it from 4.57 on."""

from __future__ import annotations

from bertfast.architectures.architecture import Architecture
from bertfast.architectures.supported_versions import IS_TRANSFORMERS_4

BERT = Architecture(
    model_type="bert",
    module="transformers.models.bert.modeling_bert",
    prefix="Bert",
    classes={
        "embeddings": ["BertEmbeddings"],
        "layer": ["BertLayer"],
        "encoder": ["BertModel"],
        "transform": ["BertPredictionHeadTransform"],
        "pretraining": ["BertForPreTraining"],
        "masked_lm": ["BertForMaskedLM"],
        "head": ["BertLMHeadModel", "BertForQuestionAnswering"],
        "pooled": ["BertForNextSentencePrediction", "BertForSequenceClassification", "BertForMultipleChoice"],
        "mean_loss": ["BertForTokenClassification"],
    },
    embeddings="embeddings",
    stack="encoder",
    layers="encoder.layer",
    embedding={
        "token_embeddings": "word_embeddings",
        "position_embeddings": "position_embeddings",
        "token_type_embeddings": "token_type_embeddings",
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
        "scale": "attention.self.scaling" if not IS_TRANSFORMERS_4 else None,
        "causal": "attention.self.is_decoder",
        "attention_dropout": "attention.self.dropout",
        "attention_output_dropout": "attention.output.dropout",
        "output_dropout": "output.dropout",
    },
    sizes={"max_position_embeddings": "position_embeddings", "type_vocab_size": "token_type_embeddings"},
    default_inputs={"token_type_ids": 0, "position_ids": 1},
    output="BaseModelOutputWithPoolingAndCrossAttentions",
    tasks={
        "ForSequenceClassification": ("pooler", "dropout", "classifier"),
        "ForMultipleChoice": ("pooler", "dropout", "classifier"),
        "ForTokenClassification": ("dropout", "classifier"),
        "ForQuestionAnswering": ("qa_outputs",),
    },
    head={
        "transform": "cls.predictions.transform",
        "decoder": "cls.predictions.decoder",
        "next_sentence": "cls.seq_relationship",
    },
    head_containers=("cls", "cls.predictions"),
    transform={"dense": "dense", "activation": "transform_act_fn", "norm": "LayerNorm"},
    pretraining_output="BertForPreTrainingOutput",
)
