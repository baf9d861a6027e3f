"""`bertfast import`: convert a TensorFlow checkpoint of Google's original BERT to Hugging Face format."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, PreTrainedModel
from tyro.conf import Positional

from bertfast.convert.tensor_bundle import find_index, read_tensors
from bertfast.models.bert import BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertModel
from bertfast.models.files import save
from bertfast.runtime.settings import Settings

# Substitutions from TensorFlow's parameter names to PyTorch's, applied in order. TensorFlow kernels, of shape
# [inputs, outputs], are transposed to PyTorch's [outputs, inputs].
_SUBSTITUTIONS = (
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
_TRAINING_STATE = re.compile(r"(^|/)(adam_[mv]|lamb_[mv]|global_step|beta[12]_power|good_steps|loss_scale)(_\d+)?$")


@dataclass(frozen=True)
class ImportSettings(Settings):
    """What to convert, and where to write it.

    Attributes:
        checkpoint: Prefix of the checkpoint's files, such as uncased_L-12_H-768_A-12/bert_model.ckpt.
        output_dir: Folder for config.json, model.safetensors and the vocabulary.
        bert_config: The model's bert_config.json; none: the one in the checkpoint's folder.
        vocab: The model's vocab.txt; none: the one in the checkpoint's folder, if there is one.
    """

    checkpoint: Positional[str]
    output_dir: Positional[str]
    bert_config: str | None = None
    vocab: str | None = None


def import_checkpoint(settings: ImportSettings) -> Path:
    """Convert a checkpoint to a model of the class that has its heads.

    Returns:
        The folder of the model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is damaged, or is not a BERT of the configured sizes.
    """
    find_index(settings.checkpoint)
    source = Path(settings.checkpoint).parent
    config_file = Path(settings.bert_config or source / "bert_config.json")
    if not config_file.is_file():
        raise FileNotFoundError(f"there is no {config_file}: name the model's bert_config.json with --bert-config")
    vocabulary = Path(settings.vocab or source / "vocab.txt")
    if settings.vocab is not None and not vocabulary.is_file():
        raise FileNotFoundError(f"there is no {vocabulary}: name the model's vocab.txt with --vocab")
    model_class, config, weights = _read(settings.checkpoint, config_file)
    model = model_class(config)
    _load(model, weights, settings.checkpoint, config_file)
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder)
    if vocabulary.is_file():
        shutil.copyfile(vocabulary, folder / "vocab.txt")
    print(f"{folder} holds a {model_class.__name__} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return folder


def _read(checkpoint: str, config_file: Path) -> tuple[type[PreTrainedModel], BertConfig, dict[str, torch.Tensor]]:
    """Return the model class that a checkpoint's heads imply, its configuration, and the weights by PyTorch name."""
    values = json.loads(config_file.read_text(encoding="utf-8"))
    weights = {
        _pytorch_name(name): torch.from_numpy(np.array(array.T if name.endswith("kernel") else array, order="C"))
        for name, array in read_tensors(checkpoint).items()
        if not _TRAINING_STATE.search(name)
    }
    model_class = _model_class(weights)
    if model_class is BertModel:
        weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    options: dict[str, Any] = {name: value for name, value in values.items() if value is not None}
    if "classifier.bias" in weights:
        options["num_labels"] = len(weights["classifier.bias"])
    return model_class, BertConfig(**options), weights


def _load(model: PreTrainedModel, weights: dict[str, torch.Tensor], checkpoint: str, config_file: Path) -> None:
    """Load the weights into the model, or raise ValueError if names or shapes do not match."""
    unexpected = [name for name in weights if name not in model.state_dict()]
    missing = [name for name in model.state_dict() if name not in weights and "decoder" not in name]
    for names, what in ((unexpected, "has unexpected weights"), (missing, "lacks weights")):
        if names:
            raise ValueError(f"{checkpoint} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    try:
        model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(
            f"the weights of {checkpoint} do not have the shapes that {config_file} implies: {error}"
        ) from error


def _pytorch_name(name: str) -> str:
    for old, new in _SUBSTITUTIONS:
        name = re.sub(old, new, name)
    return name


def _model_class(weights: dict[str, torch.Tensor]) -> type[PreTrainedModel]:
    if "classifier.bias" in weights:
        return BertForSequenceClassification
    heads = {name.split(".")[1] for name in weights if name.startswith("cls.")}
    if heads == {"predictions"}:
        return BertForMaskedLM
    return BertForPreTraining if heads else BertModel
