"""Random weights as in the paper's released code: normal, cut off at two standard deviations."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn


@torch.no_grad()
def initialise(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Initialise parameters in place.

    Args:
        model: On the CPU, with a configuration.
        names: Of the parameters; None: all. The values depend on these, on torch's seed and on nothing else, so that
            they are the same with each version of transformers.
    """
    generator = torch.Generator().manual_seed(torch.initial_seed())
    known: set[int] = set()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            if id(parameter) not in known and (names is None or name in names):
                _fill(module, own, parameter, model.config.initializer_range, generator)
            known.add(id(parameter))


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
        parameter.fill_(float(isinstance(module, nn.LayerNorm) and name == "weight"))
