"""The operators of a BERT encoder on packed tokens: argument checks, dispatch to an implementation, and gradients."""

from bertfast.ops.add_layer_norm import add_layer_norm
from bertfast.ops.attention import attention
from bertfast.ops.bias_gelu import bias_gelu, linear_gelu
from bertfast.ops.embeddings import embeddings
from bertfast.ops.gather import gather
from bertfast.ops.gelu_layer_norm import gelu_layer_norm
from bertfast.ops.linear_cross_entropy import linear_cross_entropy
from bertfast.ops.rotary import rotary

__all__ = [
    "add_layer_norm",
    "attention",
    "bias_gelu",
    "embeddings",
    "gather",
    "gelu_layer_norm",
    "linear_cross_entropy",
    "linear_gelu",
    "rotary",
]
