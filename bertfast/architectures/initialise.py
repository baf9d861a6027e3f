"""Initialise weights as in the paper's released code: from a normal distribution truncated at two deviations."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@torch.no_grad()
def initialise(model: PreTrainedModel, names: Collection[str] | None = None) -> None:
    """Initialise parameters in place.

    Args:
        model: A model with a configuration, on the CPU.
        names: Names of the parameters; None: all. The values depend only on these and on torch's seed, so that they are
            the same with each version of transformers.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    for name, parameter in model.named_parameters():  # a tied parameter has its first name
        path, _, local_name = name.rpartition(".")
        if names is None or name in names:
            deviation: float = model.config.initializer_range
            _fill(model.get_submodule(path), local_name, parameter, deviation, generator)


def _fill(module: nn.Module, name: str, parameter: Tensor, deviation: float, generator: torch.Generator) -> None:
    if isinstance(module, nn.LSTM):  # as PyTorch does
        bound = module.hidden_size**-0.5
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    elif isinstance(module, nn.Linear | nn.Embedding) and name == "weight":
        nn.init.trunc_normal_(parameter, std=deviation, a=-2 * deviation, b=2 * deviation, generator=generator)
        padding = getattr(module, "padding_idx", None)
        if padding is not None:
            parameter[padding] = 0
    else:
        parameter.fill_(float(name == "weight"))  # of a norm, else a bias
