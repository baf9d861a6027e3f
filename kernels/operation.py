"""Register launchers as PyTorch operations: a single node for torch.compile, whose output shapes are inferred."""

import inspect
from collections.abc import Callable

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


def operation(launcher: Callable, implementation: str = "triton") -> Callable:
    """Register the decorated launcher as `torch.ops.bertfast.<implementation>_<its name>` and return that.

    Schema and fake implementation are those of the contract of that name, whose parameters the launcher must have. A
    launcher with a parameter `out` is passed the contract's results, allocated but uninitialised, and returns nothing;
    a launcher without it returns its results.
    """
    fake = CONTRACTS[launcher.__name__].fake
    parameters = [name for name in inspect.signature(launcher).parameters if name != "out"]
    if parameters != list(inspect.signature(fake).parameters):
        raise TypeError(
            f"{launcher.__name__} has the parameters {parameters}, its contract {[*inspect.signature(fake).parameters]}"
        )
    name = define(implementation, launcher.__name__)
    prepared = _wrap(launcher, fake)
    _LIBRARY.impl(name, prepared, "CompositeExplicitAutograd")
    return getattr(torch.ops.bertfast, name)


def _wrap(launcher: Callable, allocate: Callable) -> Callable:
    takes_out = "out" in inspect.signature(launcher).parameters

    def launch(*arguments):
        out = allocate(*arguments) if takes_out else None
        # Kernels require contiguous vectors.
        arguments = [x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in arguments]
        if not takes_out:
            return launcher(*arguments)
        launcher(*arguments, out=out)
        return out

    def launch_on_device(tensor, *others):
        # Triton launches on the current device, which may differ from that of the tensors.
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launch(tensor, *others)
        return launch(tensor, *others)

    return launch_on_device
