"""What is made of weights for inference: once, and again when one has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

Prepared = TypeVar("Prepared")
_KEPT: WeakKeyDictionary[nn.Module, tuple[tuple, object]] = WeakKeyDictionary()


def prepared(module: nn.Module, parameters: list[Tensor], prepare: Callable[[], Prepared]) -> Prepared:
    """prepare(), kept with `module` for as long as its `parameters` are the same: their storage and their versions.

    Only in inference mode are they kept: training changes them at every step.
    """
    keeping = torch.is_inference_mode_enabled() and not torch.compiler.is_compiling()
    if not keeping or any(parameter.is_inference() for parameter in parameters):  # those know no version
        return prepare()
    key = tuple((parameter.data_ptr(), parameter._version) for parameter in parameters)
    if module not in _KEPT or _KEPT[module][0] != key:
        _KEPT[module] = (key, prepare())
    return _KEPT[module][1]
