"""How a launcher becomes an operation of torch: one node to torch.compile, with shapes known before anything runs."""

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("bertfast", "FRAGMENT")


def operation(fake: Callable) -> Callable[[Callable], Callable]:
    """Register the decorated launcher as `torch.ops.bertfast.triton_<its name>` and return that.

    `fake` takes the same arguments and returns tensors of the right shape, dtype and device that hold nothing; it asks
    for sizes by `shape`, which can be symbols, where `len` would make numbers of them. The launcher's annotations
    become the schema; it writes into none of its arguments.
    """

    def register(launcher: Callable) -> Callable:
        name = f"triton_{launcher.__name__}"
        _LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=()))
        _LIBRARY.impl(name, _prepared(launcher), "CompositeExplicitAutograd")
        torch.library.register_fake(f"bertfast::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.bertfast, name)

    return register


def _prepared(launcher: Callable) -> Callable:
    # Triton launches on the current device, which need not be the tensors'; kernels take vectors without gaps.
    def launch(tensor, *others):
        arguments = [x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in (tensor, *others)]
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launcher(*arguments)
        return launcher(*arguments)

    return launch
