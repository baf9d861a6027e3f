"""How a launcher becomes an operation of torch: one node to torch.compile, with shapes known before anything runs."""

from collections.abc import Callable

import torch

from bertfast.kernels import results

_LIBRARY = torch.library.Library("bertfast", "FRAGMENT")


def operation(launcher: Callable) -> Callable:
    """Register the decorated launcher as `torch.ops.bertfast.triton_<its name>` and return that.

    What it returns, to those who must know before it runs, is said by the function of that name in
    `kernels/results.py`. The launcher's annotations become the schema; it writes into none of its arguments.
    """
    name = f"triton_{launcher.__name__}"
    _LIBRARY.define(name + torch.library.infer_schema(launcher, mutates_args=()))
    _LIBRARY.impl(name, _prepared(launcher), "CompositeExplicitAutograd")
    torch.library.register_fake(f"bertfast::{name}", getattr(results, launcher.__name__), lib=_LIBRARY)
    return getattr(torch.ops.bertfast, name)


def _prepared(launcher: Callable) -> Callable:
    # Triton launches on the current device, which need not be the tensors'; kernels take vectors without gaps.
    def launch(tensor, *others):
        arguments = [x.contiguous() if isinstance(x, torch.Tensor) and x.dim() == 1 else x for x in (tensor, *others)]
        if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
            with torch.cuda.device(tensor.device):
                return launcher(*arguments)
        return launcher(*arguments)

    return launch
