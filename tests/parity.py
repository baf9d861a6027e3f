"""bertfast's classes and those of transformers with equal parameters, their inputs, and the results to compare."""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import transformers
from helpers import assert_as_accurate_as_torch
from torch import Tensor, nn

import bertfast
from bertfast.cli.self_test import ULPS

ROWS, COLUMNS, CHOICES = 3, 11, 2
# Of the thousands of small gradients that these tests compare, the roundings of a few happen to add up: each may have
# this many times the error of transformers', all of a model together twice.
SINGLE_GRADIENT_FACTOR = 6
SIZES = {
    "vocab_size": 53,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "num_labels": 3,
}
PADDINGS = ("none", "right", "left", "inside", "first")


@dataclass(frozen=True)
class Case:
    """One of the nine classes, with one configuration and kind of labels."""

    name: str
    class_name: str
    changes: dict = field(default_factory=dict)
    targets: tuple[str, ...] = ("tokens",)
    arguments: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


CASES = (
    Case("model", "BertModel", targets=()),
    Case("no_pooler", "BertModel", targets=(), arguments={"add_pooling_layer": False}),
    Case("pretraining", "BertForPreTraining", targets=("tokens", "pairs")),
    Case("masked_lm", "BertForMaskedLM"),
    Case("masked_lm_untied", "BertForMaskedLM", {"tie_word_embeddings": False}),
    Case("masked_lm_tanh", "BertForMaskedLM", {"hidden_act": "gelu_new"}),
    Case("masked_lm_relu", "BertForMaskedLM", {"hidden_act": "relu"}),
    Case("causal", "BertLMHeadModel", {"is_decoder": True}),
    Case("lm_head", "BertLMHeadModel"),
    Case("next_sentence", "BertForNextSentencePrediction", targets=("pairs",)),
    Case("sequence", "BertForSequenceClassification", targets=("classes",)),
    Case("multi_label", "BertForSequenceClassification", targets=("many",)),
    Case("regression", "BertForSequenceClassification", {"num_labels": 1}, ("numbers",)),
    Case("choice", "BertForMultipleChoice", targets=("choices",)),
    Case("token", "BertForTokenClassification", targets=("token_classes",)),
    Case("question", "BertForQuestionAnswering", {"num_labels": 2}, targets=("starts", "ends")),
)
EXPORTED_TO_ONNX = ("model", "masked_lm", "sequence", "choice", "question", "pretraining", "token")
"""The cases whose graphs tests/convert/test_export.py runs."""
BY_CLASS = {case.class_name: case for case in reversed(CASES)}
"""The first case of each of the nine classes."""


def models(case: Case, **changes) -> tuple[nn.Module, nn.Module]:
    """Return a case's models of bertfast and of transformers, with equal random parameters, in evaluation mode."""
    sizes = SIZES | case.changes | changes
    hf = getattr(transformers, case.class_name)(
        transformers.BertConfig(**sizes, attn_implementation="eager", use_cache=False), **case.arguments
    )
    fused = getattr(bertfast, case.class_name)(bertfast.BertConfig(**sizes), **case.arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            around = 1.0 if "LayerNorm.weight" in name else 0.0
            parameter.copy_(around + 0.14 * torch.randn(parameter.shape, generator=generator))
    fused.load_state_dict(hf.state_dict(), strict=True)
    return fused.eval(), hf.eval()


def attended(padding: str) -> Tensor:
    """Return which positions hold tokens: bool [ROWS, COLUMNS]."""
    mask = torch.ones(ROWS, COLUMNS, dtype=torch.bool)
    if padding == "right":
        mask[0, 7:] = mask[2, 1:] = False
    elif padding == "left":
        mask[0, :4] = mask[1, :1] = False
    elif padding == "inside":
        mask[0, 3:6] = mask[1, 5] = mask[1, 9] = False
    elif padding == "first":
        mask[0, 0] = mask[2, 0] = mask[2, 6] = False
    return mask


def inputs(case: Case, padding: str) -> dict[str, Tensor]:
    """Return the arguments of a forward call; no labels are at padding, or predicted only from padding."""
    generator = torch.Generator().manual_seed(1)

    def random(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    mask = attended(padding)
    values = {
        "input_ids": random(53, ROWS, COLUMNS),
        "token_type_ids": random(2, ROWS, COLUMNS),
        "attention_mask": mask.long(),
    }
    tokens = random(53, ROWS, COLUMNS).masked_fill((random(3, ROWS, COLUMNS) == 0) | ~mask, -100)
    if case.class_name == "BertLMHeadModel":
        tokens[:, 1:].masked_fill_(~mask[:, :-1], -100)
    targets = {
        "tokens": ("labels", tokens),
        "pairs": ("next_sentence_label" if len(case.targets) > 1 else "labels", random(2, ROWS)),
        "classes": ("labels", random(3, ROWS)),
        "many": ("labels", random(2, ROWS, 3).double()),
        "numbers": ("labels", random(9, ROWS).double() / 4),
        "choices": ("labels", random(CHOICES, ROWS)),
        "token_classes": ("labels", tokens.clamp(max=2)),
        "starts": ("start_positions", torch.tensor([2, 0, COLUMNS + 5])),
        "ends": ("end_positions", torch.tensor([6, 1, 4])),
    }
    if case.class_name == "BertForMultipleChoice":
        values = {name: torch.stack([x, x.flip(0)], 1) for name, x in values.items()}
    return values | dict(targets[target] for target in case.targets)


def separable(case: Case) -> dict[str, Tensor]:
    """Return the arguments of a forward call with labels in the first two rows and in the last, to be split by rows."""
    if case.name != "question":
        return inputs(case, "left")
    values = inputs(case, "none")  # transformers' softmax over the positions of an answer includes padding
    return values | {"start_positions": values["end_positions"]}


@dataclass(frozen=True)
class Results:
    """Outputs by name, only at attended positions, and gradients by parameter."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def results(model: nn.Module, values: dict[str, Tensor], mask: Tensor | None, autocast: bool = False) -> Results:
    """Run a model forward and backward: from its loss, or without one from the outputs with random weights.

    `mask` bool [rows, columns] says where outputs of that shape are compared; None: everywhere.
    """
    model.zero_grad()
    dtype = model.get_input_embeddings().weight.dtype
    values = {name: x.to(dtype) if x.is_floating_point() else x for name, x in values.items()}
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        outputs = dict(model(**values).items())
    outputs = {
        name: x[mask] if mask is not None and x.shape[:2] == mask.shape else x
        for name, x in outputs.items()
        if isinstance(x, Tensor)
    }
    loss = outputs.get("loss")
    if loss is None:
        generator = torch.Generator().manual_seed(2)
        loss = sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs.values())
    loss.backward()
    parameters = model.named_parameters(remove_duplicate=False)
    gradients = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    return Results({name: x.detach() for name, x in outputs.items()}, gradients)


def double(hf: nn.Module) -> nn.Module:
    """Return a copy of a model in float64, which computes the truth."""
    return copy.deepcopy(hf).double()


def assert_parity(
    fused: Results, hf: Results, truth: Results, dtype: torch.dtype = torch.float32, leniency: float = 1
) -> None:
    """Check every output and every gradient by the accuracy rule.

    Of hundreds of random configurations transformers happens to compute a few losses and gradients almost without an
    error: `leniency` multiplies their allowed errors, but not those of other outputs.
    """
    assert fused.outputs.keys() == hf.outputs.keys()
    # Untied, transformers has a second bias of the vocabulary that nothing reads; bertfast keeps one under both names.
    assert fused.gradients.keys() - hf.gradients.keys() <= {"cls.predictions.bias"}
    for name, value in fused.outputs.items():
        expected, true, factor = hf.outputs[name], truth.outputs[name], 2 * leniency if name == "loss" else 2
        assert_as_accurate_as_torch(value, expected, true, name=name, dtype=dtype, factor=factor)
    relative_errors = []
    for name, their in hf.gradients.items():
        true = truth.gradients[name]
        weight = truth.gradients.get(name.removesuffix("bias") + "weight")
        # The gradient of a bias that shifts all inputs of a softmax, of keys or of choices' scores, is only rounding.
        zero = name.endswith("bias") and weight is not None and true.norm() < 1e-9 * weight.norm()
        assert_as_accurate_as_torch(
            fused.gradients[name],
            their,
            true,
            name=name,
            dtype=dtype,
            neighbour=weight if zero else None,
            factor=SINGLE_GRADIENT_FACTOR * leniency,
        )
        if not zero and true.norm() > 0:
            pair = (fused.gradients[name], their)
            relative_errors.append([float((x.double() - true).norm() / true.norm()) for x in pair])
    fused_error, hf_error = torch.tensor(relative_errors, dtype=torch.float64).norm(dim=0)
    allowed = 2 * leniency * hf_error + ULPS * torch.finfo(dtype).eps
    assert fused_error <= allowed, f"all gradients together: error {fused_error:.3g}, transformers {hf_error:.3g}"
