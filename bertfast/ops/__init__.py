"""The operators of BERT-style encoders on packed tokens: argument checks, dispatch to an implementation, gradients."""

from bertfast.ops.add_layer_norm import add_layer_norm
from bertfast.ops.attention import attention
from bertfast.ops.bias_gelu import bias_gelu, linear_gelu
from bertfast.ops.embeddings import embeddings
from bertfast.ops.gated_activation import gated_activation
from bertfast.ops.gather import gather
from bertfast.ops.gelu_layer_norm import gelu_layer_norm
from bertfast.ops.linear_cross_entropy import linear_cross_entropy
from bertfast.ops.pre_norm import pre_norm
from bertfast.ops.rotary import rotary

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "embeddings",
    "gated_activation",
    "gather",
    "gelu_layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "pre_norm",
    "rotary",
]
