"""Notice at each call whether a model has changed since it was examined, without examining it again."""

from __future__ import annotations

from collections.abc import Collection
from operator import getitem
from typing import Any

import torch
from torch import nn

from bertfast.architectures.architecture import Architecture
from bertfast.architectures.methods import attention_function, method_names, original_class
from bertfast.runtime.torch_compat import module_hooks, module_tables, write_count

# Modules whose options nobody examines: they are read at each call.
_WITHOUT_OPTIONS = (nn.Linear, nn.LayerNorm)


class Snapshot:
    """The state of an encoder's modules when it was examined.

    A call with 12 layers compares more than 2,000 values, so that all of them lie in flat lists, which `map` reads.

    Args:
        encoder: A model of transformers.
        architecture: Its family.
        options: Names of the modules' attributes that the examination reads. Attributes that are added later are
            noticed without their names.
    """

    def __init__(self, encoder: nn.Module, architecture: Architecture, options: Collection[str]):
        self._architecture = architecture
        self._modules = modules = [*encoder.modules()]
        self._attributes = [vars(module) for module in modules]
        read = [
            (attributes, name)
            for module, attributes in zip(modules, self._attributes, strict=True)
            if type(module) not in _WITHOUT_OPTIONS
            for name in attributes
            if name in options
        ]
        self._option_tables, self._option_names = [attributes for attributes, _ in read], [name for _, name in read]
        kinds: set[type] = {original_class(type(module)) for module in modules}
        methods = [(kind, name) for kind in kinds for name in method_names(kind)]
        self._classes, self._methods = [kind for kind, _ in methods], [name for _, name in methods]
        self._norms = [module_tables(module)[0] for module in modules if isinstance(module, nn.LayerNorm)]
        self._buffers = [*encoder.buffers()]
        # In transformers 5 an attention reads its own configuration, most often that of the encoder.
        self._configured = [attributes for attributes in self._attributes if "config" in attributes]
        tables: list[dict[Any, Any]] = []
        for module in modules:
            tables += [*module_tables(module)[1:], *module_hooks(module)]
        self._empty_tables = [table for table in tables if not table]  # most of them, and quicker to compare
        self._tables = [table for table in tables if table]
        self._known_tables = [{**table} for table in self._tables]
        self._known_state = self._state(encoder)
        # Those made in inference mode do not count writes; they are small.
        self._uncounted = [(buffer, buffer.clone()) for buffer in self._buffers if write_count(buffer) is None]

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        return None  # the modules of a copy are others

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def still_holds(self, encoder: nn.Module) -> bool:
        """Return whether the encoder's modules are in the state that they were in."""
        # A replica of an encoder has a copy of its attributes, this one included.
        is_own = self._modules[0] is encoder
        try:
            is_same = is_own and self._tables == self._known_tables and self._state(encoder) == self._known_state
            is_same = is_same and all(torch.equal(*pair) for pair in self._uncounted)
        except (AttributeError, KeyError, RuntimeError, ValueError):
            # An attribute was deleted, or has become a tensor, whose comparison has no truth value.
            return False
        return is_same and not any(self._empty_tables)

    def _state(self, encoder: Any) -> tuple[list[Any], ...]:
        configs = {id(attributes["config"]): attributes["config"] for attributes in self._configured}
        return (
            [*map(type, self._modules)],
            [*map(len, self._attributes)],  # grows by a method that is set on a module
            [*map(getitem, self._option_tables, self._option_names)],
            [*map(getattr, self._classes, self._methods)],
            [norm.get("weight") is None or norm.get("bias") is None for norm in self._norms],
            [*map(write_count, self._buffers)],
            [getattr(encoder.config, "is_decoder", False), encoder.config.num_hidden_layers],
            [id(attributes["config"]) for attributes in self._configured],
            [attention_function(self._architecture, config._attn_implementation) for config in configs.values()],
        )
