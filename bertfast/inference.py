"""What is made of weights for inference: once, and again when one has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bertfast.memory import keep_freed_memory

Prepared = TypeVar("Prepared")
_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple, object]] = WeakKeyDictionary()


def prepared(module: nn.Module, parameters: list[Tensor], prepare: Callable[[], Prepared]) -> Prepared:
    """prepare(), kept with `module` for as long as its `parameters` are the same: their storage and their versions.

    Only in inference mode is anything kept: training changes the parameters at every step. On a CPU the process keeps
    its freed memory from then on, too, so that activations are made in pages that it has.
    """
    keeping = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
    if not keeping or any(parameter.is_inference() for parameter in parameters):  # those know no version
        return prepare()
    key = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
    if module not in _KEPT or _KEPT[module][0] != key:
        if parameters[0].is_cpu:
            keep_freed_memory()
        _KEPT[module] = (key, prepare())
    return _KEPT[module][1]
