"""`bertfast import`: convert a TensorFlow checkpoint of Google's original BERT to Hugging Face format."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import BertConfig, PreTrainedModel
from tyro.conf import Positional

from bertfast.convert.tensor_bundle import find_index, read_tensors
from bertfast.data.text_files import read_json
from bertfast.data.tokenizer import load_tokenizer
from bertfast.models.bert import (
    BertForMaskedLM,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)
from bertfast.models.files import config_from, save
from bertfast.models.tokenizers import save_model_tokenizer
from bertfast.runtime.output_folder import Origin, output_folder
from bertfast.runtime.settings import Settings
from bertfast.tasks.pretrained import require_vocabulary

logger = logging.getLogger("bertfast")

_CONTENTS = ("config.json", "model*.safetensors*", "vocab.txt", "tokenizer*.json")

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
    (r"^cls\.squad\.output_weights$", "qa_outputs.weight"),
    (r"^cls\.squad\.output_bias$", "qa_outputs.bias"),
    (r"^output_weights$", "classifier.weight"),
    (r"^output_bias$", "classifier.bias"),
    (r"(embeddings\.\w+_embeddings)$", r"\1.weight"),
)


@dataclass(frozen=True)
class ImportSettings(Settings):
    """What to convert, and where to write it.

    Attributes:
        checkpoint: Prefix of the checkpoint's files, such as uncased_L-12_H-768_A-12/bert_model.ckpt.
        output_dir: Folder for config.json, model.safetensors and the vocabulary.
        bert_config: The model's bert_config.json. If not given: the one in the checkpoint's folder.
        vocab: The model's vocab.txt. If not given: the one in the checkpoint's folder, if there is one.
        casing: Whether the tokenizer keeps upper case and accents: cased or uncased; auto: cased if the vocabulary has
            upper-case letters.
        overwrite_output_dir: Replace the model in the folder if it was imported from another checkpoint.
    """

    checkpoint: Positional[str]
    output_dir: Positional[str]
    bert_config: str | None = None
    vocab: str | None = None
    casing: Literal["auto", "cased", "uncased"] = "auto"
    overwrite_output_dir: bool = False


def import_checkpoint(settings: ImportSettings) -> Path:
    """Convert a checkpoint to a model of the class that has its heads.

    Returns:
        The folder of the model.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: The checkpoint is damaged, is not a BERT of the configured sizes, or the folder has another model.
    """
    index = find_index(settings.checkpoint)
    source = Path(settings.checkpoint).parent
    config_file = Path(settings.bert_config or source / "bert_config.json")
    if not config_file.is_file():
        raise FileNotFoundError(f"there is no {config_file}: name the model's bert_config.json with --bert-config")
    vocabulary = Path(settings.vocab or source / "vocab.txt")
    if settings.vocab is not None and not vocabulary.is_file():
        raise FileNotFoundError(f"there is no {vocabulary}: name the model's vocab.txt with --vocab")
    model_class, config, weights = _read(settings.checkpoint, config_file)
    tokenizer = None
    if vocabulary.is_file():
        cased = {"auto": None, "cased": True, "uncased": False}[settings.casing]
        tokenizer = load_tokenizer(vocabulary, cased=cased)
        require_vocabulary(tokenizer, vocabulary, config)
    _check(model_class, config, weights, settings.checkpoint, config_file)
    model = model_class(config)
    model.load_state_dict(weights, strict=False)  # the decoder is tied to the embeddings
    inputs = {"CHECKPOINT": sorted(source.glob(f"{index.stem}.*")), "--bert-config": [config_file]}
    inputs |= {"--vocab": [vocabulary]} if tokenizer is not None else {}
    origin = Origin(inputs, {"--casing": settings.casing}, "import")
    with output_folder(Path(settings.output_dir), origin, _CONTENTS, overwrite=settings.overwrite_output_dir) as folder:
        save(model, folder)
        if tokenizer is None:
            logger.warning(
                "there is no %s: %s has no tokenizer; name the model's vocab.txt with --vocab", vocabulary, folder
            )
        else:
            save_model_tokenizer(tokenizer, folder, config)
    print(f"{folder} holds a {model_class.__name__} of {sum(p.numel() for p in model.parameters()):,} parameters")
    return folder


def _read(checkpoint: str, config_file: Path) -> tuple[type[PreTrainedModel], BertConfig, dict[str, torch.Tensor]]:
    """Return the model class that a checkpoint's heads imply, its configuration, and the weights by PyTorch name."""
    tensors = read_tensors(checkpoint)
    # Optimizers and averages name their state of a parameter NAME/adam_m, NAME/Adam_1, NAME/ExponentialMovingAverage
    # and the like. Steps, powers of β and loss scales are scalars, which no parameter of BERT is.
    weights = {
        _pytorch_name(name): torch.from_numpy(np.array(array.T if name.endswith("kernel") else array, order="C"))
        for name, array in tensors.items()
        if array.ndim and name.rpartition("/")[0] not in tensors
    }
    model_class = _model_class(weights)
    if model_class in (BertForMaskedLM, BertForQuestionAnswering):  # TensorFlow's model always has a pooler
        weights = {name: value for name, value in weights.items() if not name.startswith("bert.pooler.")}
    if model_class is BertModel:
        weights = {name.removeprefix("bert."): value for name, value in weights.items()}
    options: dict[str, Any] = {name: x for name, x in read_json(config_file).items() if x is not None}
    if "classifier.bias" in weights:
        options["num_labels"] = len(weights["classifier.bias"])
    return model_class, config_from(options, config_file), weights


def _check(
    model_class: type[PreTrainedModel],
    config: BertConfig,
    weights: dict[str, torch.Tensor],
    checkpoint: str,
    config_file: Path,
) -> None:
    """Raise ValueError if names or shapes of the weights are not those of the model, before memory is allocated."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in model_class(config).state_dict().items()}
    unexpected = [name for name in weights if name not in shapes]
    missing = [name for name in shapes if name not in weights and "decoder" not in name]
    for names, what in ((unexpected, "has unexpected weights"), (missing, "lacks weights")):
        if names:
            raise ValueError(f"{checkpoint} {what}: {', '.join(names[:5])}{' …' if len(names) > 5 else ''}")
    for name, value in weights.items():
        if tuple(value.shape) != shapes[name]:
            raise ValueError(
                f"the weights of {checkpoint} do not have the shapes that {config_file} implies: {name} is "
                f"{[*value.shape]} and should be {[*shapes[name]]}"
            )


def _pytorch_name(name: str) -> str:
    for old, new in _SUBSTITUTIONS:
        name = re.sub(old, new, name)
    return name


def _model_class(weights: dict[str, torch.Tensor]) -> type[PreTrainedModel]:
    if "classifier.bias" in weights:
        return BertForSequenceClassification
    if "qa_outputs.bias" in weights:
        return BertForQuestionAnswering
    heads = {name.split(".")[1] for name in weights if name.startswith("cls.")}
    if heads == {"predictions"}:
        return BertForMaskedLM
    if heads == {"seq_relationship"}:
        return BertForNextSentencePrediction
    return BertForPreTraining if heads else BertModel
