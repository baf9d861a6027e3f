"""Layer-wise decay of the learning rate (Sun et al., 2019; Clark et al., 2020): lower layers change less."""

from __future__ import annotations

import re
from collections.abc import Callable

_LAYER = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def layerwise_scale(decay: float, layers: int) -> Callable[[str], float]:
    """Return a function from a parameter's name to the factor of its learning rate.

    The factor of the head, the pooler and a final norm is 1, that of the top layer is `decay`, and each layer below
    multiplies it once more; the embeddings are below the lowest layer.

    Args:
        decay: Factor between two layers.
        layers: Number of layers of the model.
    """

    def scale(name: str) -> float:
        if "embed" in name:
            return decay ** (layers + 1)
        found = _LAYER.search(name)
        return 1.0 if found is None else decay ** (layers - int(found[1]))

    return scale
