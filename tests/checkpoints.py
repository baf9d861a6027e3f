"""A checkpoint of transformers, and changes of its weights."""

from parity import CASES
from safetensors.torch import load_file, save_file

MASKED_LM = next(case for case in CASES if case.name == "masked_lm")


def rewrite(folder, change) -> None:
    """Apply `change` to the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})
