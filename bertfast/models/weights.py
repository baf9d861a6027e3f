"""Read the weights in a model's folder: safetensors or `torch.save` of tensors, whole or in shards; no other pickles.

Training programs save weights under the names of wrappers (`module.` of DistributedDataParallel, `_orig_mod.` of
`torch.compile`, `model.` of Lightning) or in a dictionary with other state; both are undone here.
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig

from bertfast.data.text_files import LFS_POINTER, UNREADABLE, read_json
from bertfast.models.families import architecture_of

logger = logging.getLogger("bertfast")

Weights = dict[str, Tensor]

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of peft
ADAPTED_CONFIG = "adapter_model_config.json"
"""Configuration of a model with an adapter that sentence-transformers opens: that looks for whole weights next to a
`config.json`, and takes the configuration of the base model where there is none."""

_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WRAPPER = re.compile(
    r"^(?:(?:module|model|_orig_mod)\.)+|\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PLAIN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Tables that transformers once saved with the weights; models compute them.
_COMPUTED = ("position_ids", "token_type_ids", "inv_freq")
_NESTED = ("state_dict", "model_state_dict", "model", "module")  # entries of training states that hold the weights


def read_weights(folder: Path, variant: str | None = None) -> Weights:
    """Read all weights of a folder.

    Args:
        folder: Folder of the model.
        variant: Variant of the files to prefer, as "bertfast" in "model.bertfast.safetensors".

    Returns:
        The weights by the name that they have in a model without wrappers.

    Raises:
        FileNotFoundError: There are no weights, or a shard is missing.
        ValueError: A file is damaged or holds other things than weights, or an index names a file outside the folder.
    """
    preferred = [] if variant is None else variant_files(variant)
    path = next((folder / name for name in (*preferred, *_FILES) if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} holds no weights: {_what_else(folder)}")
    stored = _read_shards(path) if path.suffix == ".json" else _read_file(path)
    weights: Weights = {}
    for key, value in stored.items():
        name = _WRAPPER.sub("", key)
        if name in weights and not (weights[name].dtype == value.dtype and torch.equal(weights[name], value)):
            raise ValueError(f"{path} holds two different weights {name}, one of them as {key}")
        weights[name] = value
    return weights


def variant_files(variant: str) -> list[str]:
    """Return the names that transformers gives the files of a variant: the whole weights, or the index of shards."""
    return [f".{variant}.".join(name.rsplit(".", 1)) for name in _FILES[:2]]


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter of peft, and not a whole model."""
    weights = ("model*.safetensors*", "pytorch_model*.bin*")
    return (folder / ADAPTER_CONFIG).is_file() and not any(any(folder.glob(pattern)) for pattern in weights)


def config_path(folder: Path) -> Path:
    """Return the file of the configuration of a model's folder, which need not exist."""
    adapted = folder / ADAPTED_CONFIG
    return adapted if adapted.is_file() and not (folder / CONFIG).exists() else folder / CONFIG


def require_floating_point(weights: Weights, name: str) -> None:
    """Raise ValueError, naming the weight, if one is not stored as plain floating point, and so would change its value.

    Args:
        weights: Weights by name.
        name: Folder or hub id of the model, for the message.
    """
    for key, value in weights.items():
        if value.dtype not in _PLAIN and not is_computed(key):
            raise ValueError(
                f"{name}: {key} is stored as {str(value.dtype).removeprefix('torch.')}, and only float16, bfloat16, "
                "float32 and float64 weights are read: save the model as it was before it was quantized or converted"
            )


def is_computed(key: str) -> bool:
    """Return whether an entry is a table that models compute, and no weight."""
    return key.endswith(_COMPUTED)


def separate_tied(weights: Weights, config: BertConfig, base: str, name: str) -> None:
    """Keep the masked-LM decoder apart from the word embeddings if the configuration ties them but they differ.

    Args:
        weights: Weights of a model with a masked-LM head; entries that the decoder lacks are added.
        config: Its configuration, which ties no more if they differ.
        base: Name of the encoder in the model.
        name: Folder or hub id, for the warning.
    """
    architecture = architecture_of(config)
    around, _, name_of_decoder = architecture.head["decoder"].rpartition(".")
    prefix = f"{around}." if around else ""
    decoder, bias = f"{prefix}{name_of_decoder}.weight", f"{prefix}bias"
    table = architecture.embedding.get("token_embeddings")
    word_embeddings = ".".join([architecture.embeddings, *filter(None, [table]), "weight"])
    # CamemBERT's configuration of transformers 5.2 does not say it, which it takes for no.
    if not getattr(config, "tie_word_embeddings", False) or decoder not in weights:
        return
    embeddings = next((key for key in weights if key.endswith(word_embeddings)), None)
    if embeddings is None:  # only the other name of the shared tensor was saved
        weights[f"{base}.{word_embeddings}"] = weights[decoder]
    elif not torch.equal(weights[embeddings], weights[decoder]):
        logger.warning("%s has a %s that differs from its word embeddings: kept apart from them", name, decoder)
        config.tie_word_embeddings = False
        if bias in weights:
            weights.setdefault(decoder.removesuffix("weight") + "bias", weights[bias].clone())


def _read_shards(index: Path) -> Weights:
    """Read the files that an index names."""
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{index} is not the index of a model's weights: it has no weight_map from names to files")
    weights: Weights = {}
    for name in sorted(set(where.values())):
        if PurePath(name).name != name or "\\" in name:
            raise ValueError(f"{index} names {name!r}: only files in its own folder are read")
        if not index.with_name(name).is_file():
            raise FileNotFoundError(
                f"{index.with_name(name)} is missing, although {index.name} names it: add that file"
            )
        weights |= _read_file(index.with_name(name))
    absent = where.keys() - weights.keys()
    if absent:
        key = min(absent)
        raise ValueError(
            f"{index} says that {where[key]} holds {key}, but it does not: the files belong to other models"
        )
    return weights


def _read_file(path: Path) -> Weights:
    """Read a file of weights."""
    with path.open("rb") as file:
        start = file.read(len(LFS_POINTER))
    if start == LFS_POINTER:
        raise ValueError(f"{path} is {UNREADABLE[LFS_POINTER]}")
    if not start:
        raise ValueError(f"{path} is empty: copy or download it again")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or cut off ({error}): copy or download it again") from error
    except Exception as error:  # unpickling damaged data raises exceptions of any class
        reason = str(error).strip().partition("\n")[0]
        if "Unsupported" in str(error):  # do not repeat PyTorch's advice to load it anyway
            reason = "a pickle of Python objects, which are not loaded because they could run any program"
        raise ValueError(
            f"{path} is damaged or holds other things than weights ({reason}): save a state_dict"
        ) from error
    while isinstance(loaded, Mapping) and (key := next((key for key in _NESTED if _is_nested(loaded, key)), None)):
        loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path} holds a {type(loaded).__name__} and no weights: save a state_dict")
    other = next((key for key, value in loaded.items() if not isinstance(value, Tensor)), None)
    if other is not None:
        kind = type(loaded[other]).__name__
        raise ValueError(f"{path} holds other things than weights ({other!r} is a {kind}): save a state_dict")
    for key, value in loaded.items():
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            kind = "meta" if value.is_meta else "nested" if value.is_nested else str(value.layout).split(".")[-1]
            raise ValueError(f"{path} holds {key} as a {kind} tensor: save it with values, as a dense tensor")
    return {str(key): value for key, value in loaded.items()}


def _is_nested(loaded: Mapping[object, object], key: str) -> bool:
    return isinstance(loaded.get(key), Mapping)


def _what_else(folder: Path) -> str:
    """Return what to do with a folder without weights, for a message."""
    if any(folder.glob("*.ckpt.index")):
        return "convert its TensorFlow checkpoint with `bertfast import`"
    if any((folder / name).exists() for name in ("tf_model.h5", "flax_model.msgpack")):
        return "those of TensorFlow and Flax are not read; save them with transformers 4 as model.safetensors"
    return "there must be a model.safetensors or a pytorch_model.bin"
