"""`bertfast import`: a checkpoint of Google's original BERT (TensorFlow) becomes a model's folder."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, PreTrainedModel
from tyro.conf import Positional

from bertfast.convert.tensor_bundle import read_tensors
from bertfast.models.bert import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel
from bertfast.models.files import save

# Their names for parts of a name, in order; a kernel is a matrix of [inputs, outputs], ours is of [outputs, inputs].
_RENAMED = (
    (r"/", "."),
    (r"\blayer_(\d+)\b", r"layer.\1"),
    (r"\bgamma$", "weight"),
    (r"\bbeta$", "bias"),
    (r"\bkernel$", "weight"),
    (r"^cls\.predictions\.output_bias$", "cls.predictions.bias"),
    (r"^cls\.seq_relationship\.output_weights$", "cls.seq_relationship.weight"),
    (r"^cls\.seq_relationship\.output_bias$", "cls.seq_relationship.bias"),
    (r"^output_weights$", "classifier.weight"),
    (r"^output_bias$", "classifier.bias"),
    (r"(embeddings\.\w+_embeddings)$", r"\1.weight"),
)
_OF_TRAINING = re.compile(r"(^|/)(adam_[mv]|lamb_[mv]|global_step|beta[12]_power|good_steps|loss_scale)(_\d+)?$")


@dataclass
class ImportSettings:
    """What to convert, and where to.

    Attributes:
        checkpoint: The checkpoint without its endings, as uncased_L-12_H-768_A-12/bert_model.ckpt.
        output_dir: Folder for config.json, model.safetensors and the vocabulary.
        config: bert_config.json; none: the one beside the checkpoint.
        vocab: vocab.txt; none: the one beside the checkpoint, if there is one.
    """

    checkpoint: Positional[str]
    output_dir: Positional[str]
    config: str | None = None
    vocab: str | None = None


def import_checkpoint(settings: ImportSettings) -> Path:
    """Convert a checkpoint; returns the folder, which then holds a model of the class whose head the weights have."""
    beside = Path(settings.checkpoint).parent
    file = Path(settings.config or beside / "bert_config.json")
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}: say with --config where the sizes of the model stand")
    vocabulary = Path(settings.vocab or beside / "vocab.txt")
    if settings.vocab is not None and not vocabulary.is_file():
        raise FileNotFoundError(f"there is no {vocabulary}")
    values = json.loads(file.read_text(encoding="utf-8"))
    weights = {
        _renamed(name): torch.from_numpy(np.array(array.T if name.endswith("kernel") else array, order="C"))
        for name, array in read_tensors(settings.checkpoint).items()
        if not _OF_TRAINING.search(name)
    }
    kind = _kind(weights)
    if kind is BertModel:
        weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    labels = {"num_labels": len(weights["classifier.bias"])} if "classifier.bias" in weights else {}
    config = BertConfig(**{name: value for name, value in values.items() if value is not None}, **labels)
    model = kind(config)
    strangers = [name for name in weights if name not in model.state_dict()]
    missing = [name for name in model.state_dict() if name not in weights and "decoder" not in name]
    for names, what in ((strangers, "holds what no BERT has"), (missing, "lacks")):
        if names:
            raise ValueError(f"{settings.checkpoint} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(f"{settings.checkpoint} is of another size than {file} says: {error}") from error
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder)
    if vocabulary.is_file():
        shutil.copyfile(vocabulary, folder / "vocab.txt")
    print(f"{folder} holds a {kind.__name__} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return folder


def _renamed(name: str) -> str:
    for old, new in _RENAMED:
        name = re.sub(old, new, name)
    return name


def _kind(weights: dict[str, torch.Tensor]) -> type[PreTrainedModel]:
    if "classifier.bias" in weights:
        return BertForSequenceClassification
    heads = {name.split(".")[1] for name in weights if name.startswith("cls.")}
    if heads == {"predictions"}:
        return BertForMaskedLM
    return BertForPreTraining if heads else BertModel
