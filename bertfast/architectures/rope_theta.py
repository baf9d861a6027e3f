"""The base θ of the angles of rotary positions (Su et al., 2021), in configurations and in live models.

With a larger base, distant positions get angles that occurred in training. Layers with a window need none.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bertfast.architectures.architecture import Architecture

_GLOBAL = "full_attention"


def with_rope_theta(architecture: Architecture, config: Any, theta: float) -> dict[str, Any]:
    """Return the rotary parameters of a configuration with another θ in layers without a window.

    Args:
        architecture: The adapter of its family, which has rotary positions.
        config: The configuration, which stays as it is.
        theta: The base of the angles.
    """
    parameters: dict[str, Any] = deepcopy(config.rope_parameters)
    of_layers = parameters if architecture.layer_type is None else parameters[_GLOBAL]
    of_layers["rope_theta"] = theta
    return parameters


@torch.no_grad()
def set_rope_theta(architecture: Architecture, model: PreTrainedModel, theta: float) -> None:
    """Set θ of the layers without a window in a model and in its configuration.

    Args:
        architecture: The adapter of its family, which has rotary positions.
        model: The model; its frequencies are overwritten in place, where captured CUDA graphs read them.
        theta: The base of the angles.
    """
    config: Any = model.config
    parameters = with_rope_theta(architecture, config, theta)
    if parameters == config.rope_parameters:
        return
    config.rope_parameters = parameters
    module: Any = getattr(model.base_model, str(architecture.rotary))
    buffers: dict[str, Tensor] = dict(module.named_buffers())
    for name, frequencies in type(module)(config).named_buffers():
        buffers[name].copy_(frequencies)
