"""Weights in Hugging Face's formats: `model.safetensors` (whole or in shards) and `pytorch_model.bin`, in and out."""

from __future__ import annotations

import json
import logging
import os
import re
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

logger = logging.getLogger("bertfast")

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
_STRAY = re.compile(r"embeddings\.(position_ids|token_type_ids)$")
_PREFIX = "bert."


def resolve(name: str | Path) -> Path:
    """The folder of a model: one that exists, or the local copy of a hub id (needs the extra `hf`)."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        raise FileNotFoundError(f"{name} is not a folder; a model is a folder with config.json and weights")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"{name} is not a folder here, and fetching it from a hub needs `pip install bertfast[hf]`"
        ) from None
    wanted = ["config.json", "*.safetensors", "*.safetensors.index.json", PICKLE, f"{PICKLE}.index.json"]
    wanted += ["vocab.txt", "tokenizer.json", "tokenizer_config.json"]
    try:
        return Path(snapshot_download(str(name), allow_patterns=wanted))
    except Exception as error:  # whatever a network can do wrong, the user named something that is not there
        raise FileNotFoundError(f"{name} is neither a folder here nor a model that the hub gave: {error}") from error


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All weights of a model's folder by their present-day names, on the CPU."""
    for name in (SAFETENSORS, PICKLE):
        if (folder / name).is_file():
            return _modern(_read(folder / name))
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise FileNotFoundError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            return _modern({key: value for shard in shards for key, value in _read(folder / shard).items()})
    raise FileNotFoundError(f"{folder} holds no weights: neither {SAFETENSORS} nor {PICKLE}, whole or in shards")


def load_weights(model: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Copy weights into a model, with or without its `bert.` prefix; what is missing or left over is reported by name.

    Raises ValueError if a shape differs, before any parameter is touched.
    """
    own = model.state_dict()
    weights = _match_prefix(weights, own)
    for key, value in weights.items():
        if key in own and own[key].shape != value.shape:
            raise ValueError(
                f"{source} is of another size: its {key} is {list(value.shape)}, the model's {list(own[key].shape)}"
            )
    shared = _tied(model)
    found = {shared.get(key, key) for key in weights}
    missing = [key for key in own if shared.get(key, key) not in found]
    unexpected = [key for key in weights if key not in own]
    model.load_state_dict({key: value for key, value in weights.items() if key in own}, strict=False)
    if missing:
        logger.warning("%s has no %s: newly initialised", source, ", ".join(missing))
    if unexpected:
        logger.warning("%s also holds %s: not used by %s", source, ", ".join(unexpected), type(model).__name__)


def save_weights(model: nn.Module, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write `model.safetensors`, under a temporary name first; a tied tensor once, if the config says that it is tied.

    `weights` are the model's own unless given, as where each rank has a part of them.
    Otherwise transformers, which unties the vocabulary's two biases then, would miss one.
    """
    shared = _tied(model)
    weights = model.state_dict() if weights is None else weights
    own = {key: value.contiguous() for key, value in weights.items() if key not in shared}
    copies = {} if model.config.tie_word_embeddings else {key: own[first].clone() for key, first in shared.items()}
    temporary = folder / f".{SAFETENSORS}"
    write_tensors(own | copies, temporary)
    os.replace(temporary, folder / SAFETENSORS)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file; OSError where the disk does not take it, as when it is full."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written, what was saved before is kept: {error}") from error


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or holds other things than weights: {error}") from error


def _modern(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in weights.items():
        for old, new in _OLD_NAMES.items():
            key = key.replace(old, new)
        if not _STRAY.search(key):
            renamed[key] = value
    return renamed


def _match_prefix(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    # A bare BertModel's names have no prefix; those of a model with a head have.
    if any(key.startswith(_PREFIX) for key in own):
        bare = not any(key.startswith(_PREFIX) for key in weights)
        return {_PREFIX + key if bare and _PREFIX + key in own else key: value for key, value in weights.items()}
    return {key.removeprefix(_PREFIX): value for key, value in weights.items()}


def _tied(model: nn.Module) -> dict[str, str]:
    """The first name of every parameter that has several: {each other name: the first}."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            tied[name] = known
    return tied
