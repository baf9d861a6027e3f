"""Find out whether a module has the options and default inputs that its configuration says."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from bertfast.architectures.architecture import Architecture
from bertfast.architectures.methods import foreign_attention, is_changed, is_genuine
from bertfast.runtime.torch_compat import has_values


def defaults_unsupported_reason(architecture: Architecture, embeddings: nn.Module) -> str | None:
    """Return why token types and positions that a call does not give are not 0 and 0, 1, …."""
    for name, step in architecture.default_inputs.items():
        values: Tensor | None = getattr(embeddings, name, None)
        if values is None or not has_values(values):
            continue
        if not bool((values == step * torch.arange(values.shape[-1], device=values.device)).all()):
            return f"its buffer {name} was changed"
    return None


def rotary_unsupported_reason(architecture: Architecture, encoder: nn.Module) -> str | None:
    """Return why the rotary positions of an encoder are not those that the packed encoder computes."""
    if architecture.rotary is None:
        return None
    module: Any = getattr(encoder, architecture.rotary, None)
    if not isinstance(module, nn.Module) or not is_genuine(architecture, module, is_called=True) or is_changed(module):
        return f"its {architecture.rotary} was replaced or has a hook"
    kinds = module.rope_type.values() if isinstance(module.rope_type, dict) else [module.rope_type]
    scaled = next((kind for kind in kinds if kind != "default"), None)
    return None if scaled is None else f"its rotary positions are scaled ({scaled})"


def layers_unsupported_reason(architecture: Architecture, config: Any, layers: nn.ModuleList) -> str | None:
    """Return why transformers does not run all layers of an encoder, which the packed encoder does."""
    number = config.num_hidden_layers
    if not architecture.slices_layers or number >= len(layers):
        return None
    return f"it has {len(layers)} layers, and the configuration says to run {number}"


def options_unsupported_reason(architecture: Architecture, config: Any, layer: nn.Module) -> str | None:
    """Return why the options of a layer's attention are not those of the configuration."""
    projection = str(architecture.layer.get("query") or architecture.layer["qkv"])
    attention = attrgetter(projection.rpartition(".")[0])(layer)
    foreign = foreign_attention(architecture, getattr(attention, "config", config)._attn_implementation)
    if foreign is not None:
        return f"its attention is {foreign}"
    causal = attrgetter(str(architecture.layer["causal"]))(layer)
    path = architecture.layer.get("heads")
    heads = None if path is None else attrgetter(path)(layer)
    is_decoder = getattr(config, "is_decoder", False)
    if heads not in (None, config.num_attention_heads):
        return f"it has {heads} attention heads and the configuration {config.num_attention_heads}: heads were pruned"
    if not causal == getattr(attention, "is_causal", causal) == is_decoder:
        return f"it was made with is_decoder={causal}, and the configuration has is_decoder={is_decoder}"
    return None
