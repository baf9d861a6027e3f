"""Our classes beside those of `transformers`: the same parameters, the same inputs, and what to compare."""

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
# this many times the error of theirs, all of a model together twice.
SINGLE_GRADIENT_FACTOR = 4
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
    """One of the nine classes, in one of its ways."""

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
BY_CLASS = {case.class_name: case for case in reversed(CASES)}
"""The first case of each of the nine classes."""


def models(case: Case, **changes) -> tuple[nn.Module, nn.Module]:
    """(ours, theirs) of a case with the same random parameters, in evaluation mode."""
    sizes = SIZES | case.changes | changes
    theirs = getattr(transformers, case.class_name)(
        transformers.BertConfig(**sizes, attn_implementation="eager", use_cache=False), **case.arguments
    )
    ours = getattr(bertfast, case.class_name)(bertfast.BertConfig(**sizes), **case.arguments)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            around = 1.0 if "LayerNorm.weight" in name else 0.0
            parameter.copy_(around + 0.14 * torch.randn(parameter.shape, generator=generator))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.eval(), theirs.eval()


def attended(padding: str) -> Tensor:
    """bool [ROWS, COLUMNS]: which places hold tokens."""
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
    """What a forward call takes, labels included: none at padding, and none that only padding would predict."""
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
    """What a forward call takes, with labels in the first two rows and in the last, which processes may share."""
    if case.name != "question":
        return inputs(case, "left")
    values = inputs(case, "none")  # transformers' softmax over the places of an answer counts padding in
    return values | {"start_positions": values["end_positions"]}


@dataclass(frozen=True)
class Results:
    """Outputs by name, at attended places alone, and gradients by parameter."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]


def results(model: nn.Module, values: dict[str, Tensor], mask: Tensor | None, autocast: bool = False) -> Results:
    """Run a model forward and backward: from the loss, or where there is none from all outputs at random weights.

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


def double(theirs: nn.Module) -> nn.Module:
    """A copy of a model in float64: the truth."""
    return copy.deepcopy(theirs).double()


def assert_parity(ours: Results, theirs: Results, truth: Results, dtype: torch.dtype = torch.float32) -> None:
    """Hold every output and every gradient to the rule."""
    assert ours.outputs.keys() == theirs.outputs.keys()
    # Untied, theirs has a second bias of the vocabulary that nothing reads; ours keeps one under both names.
    assert ours.gradients.keys() - theirs.gradients.keys() <= {"cls.predictions.bias"}
    for name, value in ours.outputs.items():
        assert_as_accurate_as_torch(value, theirs.outputs[name], truth.outputs[name], name=name, dtype=dtype)
    relative_errors = []
    for name, their in theirs.gradients.items():
        true = truth.gradients[name]
        weight = truth.gradients.get(name.removesuffix("bias") + "weight")
        # What shifts all that a softmax sees, a key's bias or that of choices' scores, has no gradient but rounding.
        zero = name.endswith("bias") and weight is not None and true.norm() < 1e-9 * weight.norm()
        assert_as_accurate_as_torch(
            ours.gradients[name],
            their,
            true,
            name=name,
            dtype=dtype,
            neighbour=weight if zero else None,
            factor=SINGLE_GRADIENT_FACTOR,
        )
        if not zero and true.norm() > 0:
            pair = (ours.gradients[name], their)
            relative_errors.append([float((x.double() - true).norm() / true.norm()) for x in pair])
    our_error, their_error = torch.tensor(relative_errors, dtype=torch.float64).norm(dim=0)
    allowed = 2 * their_error + ULPS * torch.finfo(dtype).eps
    assert our_error <= allowed, f"all gradients together: error {our_error:.3g}, theirs {their_error:.3g}"
