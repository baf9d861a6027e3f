"""Models of transformers with random weights, their input, and what users put around their modules."""

import copy

import torch
import transformers
from parity import CASES, SIZES, inputs
from torch import nn

import bertfast
import bertfast.models.fused

SEQUENCE = next(case for case in CASES if case.name == "sequence")


def live(name="BertForSequenceClassification", *, seed=0, **changes) -> nn.Module:
    """Return a model of transformers with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(**SIZES | changes)
    return getattr(transformers, name)(config).eval()


def batch(padding="right") -> dict[str, torch.Tensor]:
    return inputs(SEQUENCE, padding)


def outputs_of(model, **more):
    return model(**batch(), **more)


class Doubled(nn.Module):
    """An adapter around a linear layer, like LoRA's."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight, self.bias = inner.weight, inner.bias

    def forward(self, x):
        return 2 * self.inner(x)


def watch(model):
    model.bert.encoder.layer[1].intermediate.register_forward_hook(lambda module, _, output: output * 1.5)


def watch_layer(model):
    model.bert.encoder.layer[0].register_forward_pre_hook(lambda module, arguments: (arguments[0] + 1, *arguments[1:]))


VALUES = batch()
MASK = VALUES["attention_mask"].bool()


def pair(name="BertForSequenceClassification", **changes) -> tuple[nn.Module, nn.Module]:
    """Return a patched model, and the same without bertfast."""
    plain = live(name, **{"attn_implementation": "eager"} | changes)
    patched = copy.deepcopy(plain)
    bertfast.patch(patched)
    return patched, plain
