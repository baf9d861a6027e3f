"""One post-norm layer of a frozen model, computed by a single call of the native library.

The few tokens of one sentence take less time in a layer than Python needs to call its operators one by one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bertfast.encoder.linear import common_group, is_watched
from bertfast.encoder.packed_linear import PACKED_ACTIVATIONS, PackedLinear, require_no_gradient
from bertfast.encoder.parts import LayerParts
from bertfast.encoder.unpadding import Packed
from bertfast.ops import native
from bertfast.ops.attention import HEAD_DIMENSIONS
from bertfast.ops.dispatch import operator
from bertfast.ops.packed_linear import PackedWeight
from bertfast.runtime.torch_compat import is_transformed


@dataclass(frozen=True, eq=False)
class PackedLayer:
    """The packed weights, norms and options of a post-norm layer.

    Attributes:
        linears: The weights of queries, keys and values, of attention's output, and of the feed-forward layer.
        norms: The norms after attention and after the feed-forward layer.
        options: The options of `packed_layer_forward`, see `bertfast.kernels.contracts`.
        tensors, attention_dtype: What follows from the weights, computed once and not in each call.
    """

    linears: tuple[PackedWeight, PackedWeight, PackedWeight, PackedWeight]
    norms: tuple[nn.LayerNorm, nn.LayerNorm]
    options: tuple[int, int, int, float, bool, int | None, str]
    tensors: list[Tensor] = field(init=False)
    attention_dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", [tensor for weight in self.linears for tensor in weight.tensors])
        object.__setattr__(self, "attention_dtype", self.linears[0].compute_dtype)

    def supports(self, hidden: Tensor, packed: Packed) -> bool:
        """Return whether the layer can run a batch; else its modules are called one by one."""
        is_plain_call = packed.query_only == 0 and packed.rng is None and not torch.compiler.is_compiling()
        is_known = hidden.dtype in (torch.float32, torch.bfloat16) and hidden.is_cpu
        return is_plain_call and is_known and not is_transformed() and not self.linears[0].uses_onednn(len(hidden))

    def __call__(self, hidden: Tensor, packed: Packed, rows: Tensor | None = None) -> Tensor:
        """Run the layer: [T, H] -> [T, H], or [R, H] at `rows`, int64 [R].

        Raises:
            RuntimeError: `hidden` requires a gradient.
        """
        require_no_gradient(hidden)
        first, second = self.norms
        y: Tensor = operator("cpu", "packed_layer_forward")(
            hidden,
            packed.sequences.cu_seqlens,
            self.tensors,
            [first.weight, first.bias, second.weight, second.bias],
            [first.eps, second.eps],
            *self.options,
            self.attention_dtype,
            rows,
        )
        return y


def packed_layer(parts: LayerParts) -> PackedLayer | None:
    """Return the layer of these parts; None if its modules have to be called one by one."""
    group = common_group(parts.qkv)
    linears = (parts.attention_dense, *parts.intermediate, parts.output_dense)
    norms = (parts.attention_norm, parts.output_norm)
    if group is None or parts.pre_norm or parts.gated or parts.rotary is not None or parts.query_groups != 1:
        return None
    if parts.activation not in PACKED_ACTIVATIONS or native.UNAVAILABLE_REASON is not None:
        return None
    packed = [linear.packed for linear in linears if isinstance(linear, PackedLinear) and not is_watched(linear)]
    affine = [norm for norm in norms if type(norm) is nn.LayerNorm and norm.bias is not None]
    columns = group.columns // 3
    width = parts.head_dimension if parts.head_dimension is not None else columns // (parts.heads or columns)
    scale = width**-0.5 if parts.scale is None else parts.scale
    if len(packed) != 3 or len(affine) != 2 or width not in HEAD_DIMENSIONS or scale <= 0:
        return None
    dense, intermediate, output = packed
    options = (columns // width, width, intermediate.columns, scale, parts.causal, parts.window)
    activation = PACKED_ACTIVATIONS[parts.activation]
    return PackedLayer((group, dense, intermediate, output), (affine[0], affine[1]), (*options, activation))
