"""How a launcher becomes an operation of torch: one node to torch.compile, with shapes known before anything runs."""

import inspect
from collections.abc import Callable

import torch

from bertfast.kernels.contracts import CONTRACTS

_LIBRARY = torch.library.Library("bertfast", "FRAGMENT")


def define(implementation: str, name: str) -> str:
    """Define `torch.ops.bertfast.<implementation>_<name>` by its contract, without a kernel; return its name there."""
    own = f"{implementation}_{name}"
    # The compiled library takes integers that are known; only Triton's launchers can be given symbols.
    schema = CONTRACTS[name].schema
    _LIBRARY.define(own + (schema if implementation == "triton" else schema.replace("SymInt", "int")))
    torch.library.register_fake(f"bertfast::{own}", CONTRACTS[name].fake, lib=_LIBRARY)
    return own


def operation(launcher: Callable, implementation: str = "triton") -> Callable:
    """Register the decorated launcher as `torch.ops.bertfast.<implementation>_<its name>` and return that.

    Its schema and its fake implementation are those of the contract of that name, whose parameters it takes and which
    has their types. A launcher with a parameter `out` is given the contract's results, allocated and not yet written,
    and returns nothing; another returns its own.
    """
    fake = CONTRACTS[launcher.__name__].fake
    parameters = [name for name in inspect.signature(launcher).parameters if name != "out"]
    if parameters != list(inspect.signature(fake).parameters):
        raise TypeError(f"{launcher.__name__} takes {parameters}, its contract {[*inspect.signature(fake).parameters]}")
    name = define(implementation, launcher.__name__)
    prepared = _prepared(launcher, fake)
    _LIBRARY.impl(name, prepared, "CompositeExplicitAutograd")
    return getattr(torch.ops.bertfast, name)


def _prepared(launcher: Callable, allocate: Callable) -> Callable:
    takes_out = "out" in inspect.signature(launcher).parameters

    def launch(*arguments):
        out = allocate(*arguments) if takes_out else None
        # Kernels take vectors without gaps.
        arguments = [x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in arguments]
        if not takes_out:
            return launcher(*arguments)
        launcher(*arguments, out=out)
        return out

    def launch_on_device(tensor, *others):
        # Triton launches on the current device, which need not be the tensors'.
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launch(tensor, *others)
        return launch(tensor, *others)

    return launch_on_device
