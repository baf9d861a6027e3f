"""Register functions as PyTorch operators: single nodes for torch.compile, whose output shapes are inferred."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from bertfast.kernels.contracts import CONTRACTS

_LIBRARY = torch.library.Library("bertfast", "FRAGMENT")


def define(implementation: str, name: str) -> str:
    """Define `torch.ops.bertfast.<implementation>_<name>` by its contract, without a kernel, and return that name."""
    full_name = f"{implementation}_{name}"
    schema = CONTRACTS[name].schema
    if implementation != "triton" and torch.__version__ < "2.13":  # the stable ABI passes SymInt from 2.13 on
        schema = schema.replace("SymInt", "int")
    _LIBRARY.define(full_name + schema)
    torch.library.register_fake(f"bertfast::{full_name}", CONTRACTS[name].fake, lib=_LIBRARY)
    return full_name


def operation(launch: Callable[..., Any], implementation: str = "triton") -> Callable[..., Any]:
    """Register the decorated function as `torch.ops.bertfast.<implementation>_<its name>` and return that operator.

    Schema and fake implementation are those of the contract of that name, whose parameters the function must have. A
    function with a parameter `out` is passed the contract's results, allocated but uninitialised, and returns nothing;
    a function without it returns its results.
    """
    fake = CONTRACTS[launch.__name__].fake
    parameters = [name for name in inspect.signature(launch).parameters if name != "out"]
    if parameters != list(inspect.signature(fake).parameters):
        raise TypeError(
            f"{launch.__name__} has the parameters {parameters}, its contract {[*inspect.signature(fake).parameters]}"
        )
    name = define(implementation, launch.__name__)
    _LIBRARY.impl(name, _on_device(launch, fake), "CompositeExplicitAutograd")
    operator: Callable[..., Any] = getattr(torch.ops.bertfast, name)
    return operator


def _on_device(launch: Callable[..., Any], allocate: Callable[..., Any]) -> Callable[..., Any]:
    """Return `launch` with allocated results and contiguous vectors, on the device of the first tensor."""
    takes_out = "out" in inspect.signature(launch).parameters

    def allocate_and_launch(*arguments: Any) -> Any:
        out = allocate(*arguments) if takes_out else None
        # Kernels require contiguous vectors.
        dense = [x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in arguments]
        if not takes_out:
            return launch(*dense)
        launch(*dense, out=out)
        return out

    def launch_on_device(tensor: torch.Tensor, *others: Any) -> Any:
        # Triton launches on the current device, which may differ from that of the tensors.
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return allocate_and_launch(tensor, *others)
        return allocate_and_launch(tensor, *others)

    return launch_on_device
