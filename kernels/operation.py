"""How a launcher becomes an operation of torch: one node to torch.compile, with shapes known before anything runs."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("bertfast", "FRAGMENT")


def operation(fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated launcher as `torch.ops.bertfast.triton_<its name>` and return that.

    `fake` takes the same arguments and returns tensors of the right shape, dtype and device that hold nothing. The
    launcher's annotations become the schema; it writes into none of its arguments.
    """

    def register(launcher: Callable) -> Callable:
        name = f"triton_{launcher.__name__}"
        _LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=()))
        _LIBRARY.impl(name, _on_its_device(launcher), "CompositeExplicitAutograd")
        torch.library.register_fake(f"bertfast::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.bertfast, name)

    return register


def _on_its_device(launcher: Callable) -> Callable:
    # Triton launches on the current device, which need not be the tensors'.
    def launch(tensor, *arguments):
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launcher(tensor, *arguments)
        return launcher(tensor, *arguments)

    return launch
