"""Models of the families that bertfast fuses besides BERT: configurations, inputs, and patched copies."""

import copy
import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from parity import BY_CLASS, EXPORTED_TO_ONNX
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import RobertaProcessing, TemplateProcessing
from torch import Tensor, nn

import bertfast
from bertfast.architectures import FAMILIES
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer
from bertfast.models.families import pretraining_class

ROWS, COLUMNS, CHOICES, VOCABULARY = 4, 12, 2, 53
PREFIXES = {
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "distilbert": "DistilBert",
}
ROTARY = {"modernbert": "ModernBert", "nomic_bert": "NomicBert", "eurobert": "EuroBert"}
PREFIXES |= {family: prefix for family, prefix in ROTARY.items() if family in FAMILIES}
TASKS = (
    "Model",
    "ForMaskedLM",
    "ForCausalLM",
    "ForPreTraining",
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForTokenClassification",
    "ForQuestionAnswering",
)
# A family's names of what BERT's configuration has.
_NAMES = {
    "distilbert": {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "hidden_dim",
        "hidden_act": "activation",
        "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    "modernbert": {
        "hidden_act": "hidden_activation",
        "layer_norm_eps": "norm_eps",
        "hidden_dropout_prob": "mlp_dropout",
        "attention_probs_dropout_prob": "attention_dropout",
    },
    "eurobert": {"layer_norm_eps": "rms_norm_eps", "attention_probs_dropout_prob": "attention_dropout"},
}


@dataclass(frozen=True)
class FamilyCase:
    """A class of a family with a configuration, and what a call has."""

    family: str
    task: str
    changes: dict = field(default_factory=dict)
    paddings: tuple[str, ...] = ("none", "right", "left", "inside")
    gives_embeddings: bool = False
    gives_positions: bool = False
    pads_by_id: bool = False
    leaves_transform: bool = False

    @property
    def class_name(self) -> str:
        return PREFIXES[self.family] + self.task

    @property
    def has_kinks(self) -> bool:
        """Whether its gradients have steps, at which the roundings of bf16 decide on which side an activation is."""
        head = self.family == "distilbert" and self.task in ("ForSequenceClassification", "ForMultipleChoice")
        return head or self.changes.get("hidden_act") == "relu"

    def __str__(self) -> str:
        return f"{self.family}-{self.task}"


def has_class(family: str, task: str) -> bool:
    """Return whether transformers has a class that runs: two of 5.2 read a pooler that they do not make."""
    is_broken = family in ("xlm-roberta", "camembert") and task == "ForMultipleChoice"
    is_broken = is_broken and transformers.__version__.startswith("5.2.")
    return hasattr(transformers, PREFIXES[family] + task) and not is_broken


def paddings(family: str) -> tuple[str, ...]:
    """Return the kinds of padding that run packed: windows of ModernBERT count padding between tokens."""
    return ("none", "right", "left") if family == "modernbert" else ("none", "right", "left", "inside")


def first_case(family: str, task: str) -> FamilyCase:
    """Return the case of a class."""
    kinds = paddings(family)
    if family == "modernbert" and task == "ForSequenceClassification":
        kinds = ("none", "right")  # nor does a masked first token, which this class reads
    # NomicBERT's SiLU is also in its masked-LM head, whose operator has GELU.
    changes = {"hidden_act": "gelu"} if (family, task) == ("nomic_bert", "ForMaskedLM") else {}
    return FamilyCase(family, task, changes, kinds)


CASES = tuple(first_case(family, task) for family in PREFIXES for task in TASKS if has_class(family, task))
"""One case of each class."""


def config(case: FamilyCase, **changes) -> transformers.PretrainedConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "num_labels": 2 if case.task == "ForQuestionAnswering" else 3,
        "use_cache": False,
        "attn_implementation": "eager",
    }
    if case.family == "electra":
        sizes["embedding_size"] = 32
    if case.family in ("roberta", "xlm-roberta", "camembert"):
        sizes["type_vocab_size"] = 1
    if case.family in ROTARY:
        sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        sizes["attn_implementation"] = "sdpa"  # their eager attention has a softmax in fp32, also in float64
    if case.family == "modernbert":
        # Windows of 4 on each side, in the second of two layers.
        sizes |= {"local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}
    if case.family == "eurobert":
        sizes["num_key_value_heads"] = 1
    if case.task == "ForCausalLM":
        sizes["is_decoder"] = True
    sizes |= case.changes | changes
    names = _NAMES.get(case.family, {})
    sizes = {names.get(name, name): value for name, value in sizes.items()}
    return getattr(transformers, f"{PREFIXES[case.family]}Config")(**sizes)


def plain(case: FamilyCase, **changes) -> nn.Module:
    """Return a model of transformers with random parameters, in evaluation mode."""
    model = getattr(transformers, case.class_name)(config(case, **changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            around = 1.0 if parameter.dim() == 1 and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.14 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def pair(case: FamilyCase, **changes) -> tuple[nn.Module, nn.Module]:
    """Return a patched model, and the same without bertfast; nothing but a case's transform is left to transformers."""
    hf = plain(case, **changes)
    patched = copy.deepcopy(hf)
    report = bertfast.patch(patched)
    assert all(case.leaves_transform and "transform" in path for path in report.left), report
    return patched, hf


def no_dropout(case: FamilyCase) -> dict[str, float]:
    changes = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    if case.family == "modernbert":
        changes |= {"embedding_dropout": 0.0, "classifier_dropout": 0.0}
    if case.family == "electra":
        changes["summary_last_dropout"] = 0.0
    if case.family == "distilbert":
        changes |= {"qa_dropout": 0.0, "seq_classif_dropout": 0.0}
    return changes


def attended(case: FamilyCase, rows: int = ROWS) -> Tensor:
    """Return which positions hold tokens: bool [rows, COLUMNS]; rows are padded in turn as the case says."""
    mask = torch.ones(rows, COLUMNS, dtype=torch.bool)
    for row in range(rows):
        padding = case.paddings[row % len(case.paddings)]
        if padding == "right":
            mask[row, 7:] = False
        elif padding == "left":
            mask[row, : 3 + row % 3] = False
        elif padding == "inside":
            mask[row, 3:5] = mask[row, 9] = False
    return mask


def inputs(case: FamilyCase, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """Return the arguments of a call, with labels only where padding has no effect on the loss, and the mask."""
    generator = torch.Generator().manual_seed(1)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    rows = ROWS * CHOICES if case.task == "ForMultipleChoice" else ROWS
    mask, embeddings = attended(case, rows), model.get_input_embeddings()
    tokens = ids(VOCABULARY, rows, COLUMNS)
    if case.pads_by_id:
        tokens = tokens.clamp(min=4).masked_fill(~mask, embeddings.padding_idx or 0)
    values = {"input_ids": tokens, "attention_mask": mask.long()}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        values["token_type_ids"] = ids(2, rows, COLUMNS)
    if case.gives_positions:
        values["position_ids"] = ids(model.config.max_position_embeddings, rows, COLUMNS)
    if case.gives_embeddings:
        del values["input_ids"]
        values["inputs_embeds"] = torch.randn(rows, COLUMNS, embeddings.embedding_dim, generator=generator)
    labels = tokens.masked_fill((ids(3, rows, COLUMNS) == 0) | ~mask, -100)
    if case.task == "ForMultipleChoice":
        values = {name: x.unflatten(0, (ROWS, CHOICES)) for name, x in values.items()}
        values["labels"] = ids(CHOICES, ROWS)
    elif case.task == "ForMaskedLM":
        values["labels"] = labels
    elif case.task == "ForCausalLM":
        values["labels"] = labels
        labels[:, 1:].masked_fill_(~mask[:, :-1], -100)
    elif case.task == "ForPreTraining":
        values["labels"] = ids(2, rows, COLUMNS)
    elif case.task == "ForSequenceClassification":
        values["labels"] = ids(model.config.num_labels, rows)
    elif case.task == "ForTokenClassification":
        values["labels"] = labels.clamp(max=model.config.num_labels - 1)
    elif case.task == "ForQuestionAnswering" and mask.all():  # transformers' softmax includes padding
        values |= {"start_positions": ids(COLUMNS, rows), "end_positions": ids(COLUMNS, rows)}
    return values, mask


def random_case(family: str, seed: int) -> FamilyCase:
    """Return a random configuration of a random class, and a random kind of call."""
    draw = random.Random(seed)
    task = draw.choice([task for task in TASKS if has_class(family, task)])
    heads = draw.choice([1, 2, 3])
    changes = {
        "hidden_size": heads * draw.choice([32, 64]),
        "num_attention_heads": heads,
        "num_hidden_layers": draw.choice([1, 2, 3]),
        "intermediate_size": draw.choice([24, 48, 100]),
        "vocab_size": draw.choice([VOCABULARY, 64, 71]),
        "max_position_embeddings": draw.choice([20, 33]),
        "hidden_act": draw.choice(["gelu", "gelu_new", "relu", "silu", "gelu_pytorch_tanh"]),
        "pad_token_id": draw.choice([0, 1, 3]),
        "tie_word_embeddings": draw.random() < 0.8,
        "attn_implementation": draw.choice(["eager", "sdpa"]),
    }
    # The causal mask of transformers 4 for SDPA overflows in float64, and its ELECTRA has none.
    if transformers.__version__ < "5" and (task == "ForCausalLM" or family == "electra"):
        changes["attn_implementation"] = "eager"
    if task != "ForQuestionAnswering":
        changes["num_labels"] = draw.choice([2, 3, 5])
    if family in ROTARY:
        changes["attn_implementation"] = "sdpa"
        if (family, task) == ("nomic_bert", "ForMaskedLM"):
            changes["hidden_act"] = "gelu"
        changes |= _random_rotary_options(family, draw, heads)
    elif family != "distilbert":
        changes |= {"layer_norm_eps": draw.choice([1e-12, 1e-5]), "type_vocab_size": draw.choice([1, 2])}
    else:
        changes["sinusoidal_pos_embds"] = draw.random() < 0.5
    if family == "electra":
        changes["embedding_size"] = draw.choice([changes["hidden_size"], 24, 32])
        changes["summary_use_proj"] = draw.random() < 0.8
    kinds = draw.choice([*((kind,) for kind in paddings(family)), ("right", "left"), paddings(family)])
    takes_positions = family != "distilbert" or transformers.__version__ >= "5"
    return FamilyCase(
        family,
        task,
        changes,
        kinds,
        gives_embeddings=draw.random() < 0.2 and task != "ForMultipleChoice",
        gives_positions=draw.random() < 0.2 and takes_positions and task != "ForMultipleChoice",
        pads_by_id=draw.random() < 0.5,
    )


def _random_rotary_options(family: str, draw: random.Random, heads: int) -> dict:
    changes = {"layer_norm_eps": draw.choice([1e-12, 1e-5])}
    dropped = draw.random() < 0.3
    changes["attention_probs_dropout_prob"] = 0.1 * dropped
    if family == "modernbert":
        biases = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias", "decoder_bias")
        changes |= {name: draw.random() < 0.5 for name in biases}
        changes |= {"local_attention": draw.choice([2, 6, 64]), "global_attn_every_n_layers": draw.choice([1, 2, 3])}
        changes |= {"classifier_pooling": draw.choice(["cls", "mean"]), "hidden_dropout_prob": 0.1 * dropped}
    elif family == "eurobert":
        changes |= {"num_key_value_heads": draw.choice([1, heads]), "attention_bias": draw.random() < 0.5}
        changes |= {"mlp_bias": draw.random() < 0.5, "classifier_pooling": draw.choice(["bos", "mean", "late"])}
    else:
        changes |= {"type_vocab_size": draw.choice([1, 2]), "hidden_dropout_prob": 0.1 * dropped}
    return changes


FINE_TUNED = ("ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering")
"""The classes that programs fine-tune; tests/training/test_finetune_families.py runs each of them."""


PRETRAINED = ("ForMaskedLM",)
"""The classes that are pre-trained; tests/training/test_pretrain_families.py trains each of them."""
PRETRAINED_FAMILIES = [family for family in PREFIXES if family not in ("nomic_bert", "eurobert")]
"""The families that are pre-trained from random weights; the others are from a checkpoint."""
GRAPHS = ("Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering")
"""The classes whose ONNX graphs tests/convert/test_export_families.py runs."""


def table() -> str:
    """Return the table of classes in docs/COMPATIBILITY.md: what the tests run of each."""
    programs = {
        "exported": [task for task in TASKS if task not in GRAPHS],
        "exported (ONNX)": GRAPHS,
        "fine-tuned": FINE_TUNED,
        "embedded": ("Model",),
    }
    rows = []
    for task in TASKS:
        case = BY_CLASS["BertLMHeadModel" if task == "ForCausalLM" else f"Bert{task}"]
        programs_of_bert = programs | {
            "exported": [] if case.name in EXPORTED_TO_ONNX else [task],
            "exported (ONNX)": [task] if case.name in EXPORTED_TO_ONNX else [],
        }
        trained = pretraining_class(transformers.BertConfig()).__name__ == f"Bert{task}"
        cells = [_cell(task, programs_of_bert, "pre-trained" if trained else None)]
        for family in PREFIXES:
            how = "pre-trained" if family in PRETRAINED_FAMILIES else "pre-trained from a checkpoint"
            cell = _cell(task, programs, how if task in PRETRAINED else None)
            cells.append(cell if has_class(family, task) else "n/a")
        rows.append(f"| `{task}` | {' | '.join(cells)} |")
    header = ["| class | " + " | ".join(["Bert", *PREFIXES.values()]) + " |", "|---" * (len(PREFIXES) + 2) + "|"]
    return "\n".join([*header, *rows])


def _cell(task: str, programs: dict, trained: str | None) -> str:
    named = [name for name, tasks in programs.items() if task in tasks]
    return ", ".join(["patched", *([] if trained is None else [trained]), *named])


SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
_NAMED = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
_OF_EUROBERT = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "mask_token": "<|mask|>"}


def write_tokenizer(family: str, folder: Path, texts: list[str]) -> int:
    """Train a tokenizer of the family's kind, and return the size of its vocabulary."""
    if family in ("electra", "distilbert", "nomic_bert"):
        tokenizer = train_tokenizer(texts, 128)
        save_tokenizer(tokenizer, folder)
        kind = {"electra": "ElectraTokenizer", "distilbert": "DistilBertTokenizer"}.get(family, "BertTokenizer")
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tokenizer_class": kind}))
        return tokenizer.get_vocab_size()
    if family in ("roberta", "modernbert", "eurobert"):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = [*_OF_EUROBERT.values()] if family == "eurobert" else SPECIAL
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        processor = RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
        if family == "eurobert":
            first, last = special[:2]
            single = f"{first} $A {last}"
            ids = [(first, 0), (last, 1)]
            processor = TemplateProcessing(single=single, pair=f"{single} $B {last}", special_tokens=ids)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
        processor = TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processor
    tokenizer.save(str(folder / "tokenizer.json"))
    named = dict(zip(_NAMED, SPECIAL, strict=True)) | {"cls_token": "<s>", "sep_token": "</s>"}
    if family == "eurobert":
        named = _OF_EUROBERT | {"pad_token": _OF_EUROBERT["eos_token"], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    return tokenizer.get_vocab_size()


def write_model(family: str, folder: Path, texts: list[str]) -> Path:
    """Write the folder of a small model with a masked-LM head and a tokenizer."""
    folder.mkdir()
    case = FamilyCase(family, "ForMaskedLM", {"vocab_size": 8 + write_tokenizer(family, folder, texts)})
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1, "mask_token_id": 2} if family == "eurobert" else {}
    plain(case, max_position_embeddings=80, num_labels=2, **ids).save_pretrained(folder)
    return folder
