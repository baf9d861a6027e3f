"""Check an installed bertfast: versions, the commands, an operator, and a patched model against an unpatched one.

    python smoke_test.py                the native library may be missing
    python smoke_test.py --native       it must have been built, and must load

It uses nothing but the package and what that requires, and runs from any folder outside a checkout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
from typing import Literal

import torch

TOLERANCE = 1e-5  # fp32, relative to the largest value


def output_of(*arguments: str) -> str:
    """Return what `bertfast ARGUMENTS` prints to standard output."""
    command = [sys.executable, "-m", "bertfast", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_commands() -> dict[str, dict[str, str]]:
    """Check `--version`, `--help`, `doctor --json` and the installed recipes; return doctor's report."""
    import bertfast
    from bertfast.cli.recipes import recipe_names

    installed = importlib.metadata.version("bertfast")
    assert bertfast.__version__ == installed, (bertfast.__version__, installed)
    assert installed in output_of("--version")
    assert "pretrain" in output_of("--help")
    assert "fast" in recipe_names(), "the recipes are not installed"
    report: dict[str, dict[str, str]] = json.loads(output_of("doctor", "--json"))
    assert report["versions"]["bertfast"] == installed
    return report


def check_operator(implementation: Literal["cpu", "reference"]) -> float:
    """Return the largest relative difference of attention and its gradients from the reference, in fp32."""
    from bertfast import ops

    torch.manual_seed(0)
    qkv = torch.randn(21, 3, 2, 64)  # [tokens, 3, heads, head dimension]
    results = []
    names: tuple[Literal["cpu", "reference"], ...] = (implementation, "reference")
    for name in names:
        x = qkv.clone().requires_grad_()
        context = ops.attention(x, [5, 13, 3], implementation=name)
        (gradient,) = torch.autograd.grad(context.square().sum(), x)
        results.append((context.detach(), gradient))
    error = max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(*results, strict=True))
    assert error < TOLERANCE, f"attention: {implementation} differs from the reference by {error}"
    return error


def check_model() -> float:
    """Return the largest difference of a tiny model's hidden states, patched from unpatched, at real tokens."""
    import transformers

    import bertfast

    config = bertfast.preset_config("tiny", vocab_size=200)
    torch.manual_seed(0)
    model = transformers.BertModel(config)
    model.train(False)
    lengths = torch.randint(8, 128, (16,))
    mask = (torch.arange(128) < lengths[:, None]).long()
    ids = torch.randint(200, (16, 128)) * mask
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        report = bertfast.patch(model)
        hidden = model(ids, attention_mask=mask).last_hidden_state
    assert type(model) is bertfast.BertModel, report
    error = float((hidden - expected)[mask.bool()].abs().max())
    assert error < TOLERANCE, f"the patched model differs from transformers' by {error}"
    return error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native", action="store_true", help="Fail if the native library is missing.")
    native = parser.parse_args().native
    report = check_commands()
    library = report["environment"]["library"]
    assert not (native and library.startswith("none")), library
    operator_error = check_operator("reference" if library.startswith("none") else "cpu")
    print(
        f"bertfast {report['versions']['bertfast']} on Python {report['versions']['python']}, "
        f"torch {report['versions']['torch']}, transformers {report['versions']['transformers']}\n"
        f"native library: {library}\n"
        f"differences: attention {operator_error:.1e}, patched model {check_model():.1e}"
    )


if __name__ == "__main__":
    main()
