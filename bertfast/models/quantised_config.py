"""The entry of a configuration that says that a model is quantised, and with it saved in `config.json`."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from bertfast.encoder.packed_linear import is_frozen

# transformers refuses to open a model with a `quantization_config` without a `quant_method`, also where bertfast is not
# imported; with one that it does not know, it would only warn.
_ENTRY = "quantization_config"
_QUANTISED = {"library": "bertfast", "weights": "int8"}


def is_quantised(config: Any, source: str = "config.json") -> bool:
    """Return whether a model with this configuration, or the dictionary of its file, is quantised by bertfast.

    Args:
        config: The configuration, or the dictionary.
        source: The file that it is from, for messages.

    Raises:
        ValueError: Its entry is no object, has weights of another kind than int8, or entries that are not known.
    """
    entry = config.get(_ENTRY) if isinstance(config, dict) else getattr(config, _ENTRY, None)
    if isinstance(config, dict) and not isinstance(entry, dict | None):
        raise ValueError(
            f"{source}: {_ENTRY} must be an object, got {entry!r:.40}: take the config.json that belongs to the weights"
        )
    if not isinstance(entry, dict) or entry.get("library") != _QUANTISED["library"]:
        return False
    if entry.get("weights") != _QUANTISED["weights"]:
        raise ValueError(
            f"{source}: {_ENTRY} has weights {entry.get('weights')!r}, and this version of bertfast opens "
            f"{_QUANTISED['weights']!r}: install a later version, or save the quantised model again"
        )
    unknown = next((key for key in entry if key not in _QUANTISED), None)
    if unknown is not None:
        raise ValueError(
            f"{source}: {_ENTRY} has an entry {unknown!r:.40}, which this version of bertfast does not know: install a "
            "later version, or save the quantised model again"
        )
    return True


def mark(model: nn.Module) -> None:
    """Note in the configurations of a quantised model, which are saved with it, that it is one."""
    quantised = [module for module in model.modules() if isinstance(module, PreTrainedModel) and is_frozen(module)]
    _copy_configs(quantised)
    for module in quantised:
        setattr(module.config, _ENTRY, dict(_QUANTISED))


def unmark_model(model: PreTrainedModel) -> None:
    """Remove the note from the configurations of a model that was made of a quantised model's."""
    marked = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    _copy_configs(marked)
    for module in marked:
        unmark(module.config)


def unmark(config: Any) -> None:
    """Have transformers open the dequantised weights of a model with this configuration."""
    if is_quantised(config):
        delattr(config, _ENTRY)


def _copy_configs(models: list[PreTrainedModel]) -> None:
    """Give models their own configurations: other models may have been made of the same ones."""
    copies: dict[int, Any] = {}  # so that the modules of a model still share one
    for module in dict.fromkeys(part for model in models for part in model.modules()):
        config = vars(module).get("config")
        if isinstance(config, PretrainedConfig):
            vars(module)["config"] = copy.deepcopy(config, copies)
