"""Adapters of LoRA (Hu et al., 2022) in peft's format: added to a model that is trained, saved, opened and merged."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bertfast.architectures.methods import original_class
from bertfast.data.text_files import read_json
from bertfast.models.families import architecture_of
from bertfast.models.weights import ADAPTED_CONFIG, ADAPTER_CONFIG, CONFIG
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.extras import install_command
from bertfast.runtime.tensor_file import replaced_files, write_tensors

ALL_LINEAR = "all-linear"

_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of all names in that file
_NAME = "default"  # of the adapter in the model; peft's files leave it out
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "Model": "FEATURE_EXTRACTION",
}


class Adapter:
    """A LoRA adapter in a model: all other parameters are frozen, except for modules that are trained whole.

    Args:
        model: The model; its linear layers are replaced by peft's.
        base: Folder or hub id of the model without the adapter, which the adapter's files name.
        whole: What the names of the parameters begin with that are trained whole: the head, and what is new.
        rank: Rank of the updates.
        alpha: Scale of the updates, which are multiplied by alpha / rank.
        dropout: Dropout probability of the inputs of the updates.
        targets: Names of linear layers that get an update, or `ALL_LINEAR`; none: those of queries and values.
        config_file: Name of the file of the model's configuration, `CONFIG` or `ADAPTED_CONFIG`.

    Raises:
        ImportError: peft is not installed.
        ValueError: The model's layers have no linear layer of such a name.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        base: str,
        whole: Collection[str],
        *,
        rank: int,
        alpha: float,
        dropout: float,
        targets: Sequence[str] = (),
        config_file: str = CONFIG,
    ):
        peft = load_peft("--lora-rank")
        kind = original_class(type(model)).__name__
        task_type = next((name for end, name in _TASK_TYPES.items() if kind.endswith(end)), None)
        saved_whole = sorted({prefix.removesuffix(".").rpartition(".")[2] for prefix in whole})
        self.model, self.config_file = model, config_file
        self.options = peft.LoraConfig(
            task_type=task_type,
            base_model_name_or_path=base,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=_target_modules(model, targets),
        )
        self._tuner = peft.LoraModel(model, self.options, _NAME)
        self.options.modules_to_save = saved_whole or None  # before, peft would put wrappers around these modules
        for name, parameter in model.named_parameters():
            if name.startswith(tuple(whole)):
                parameter.requires_grad_()

    def save(self, folder: Path) -> None:
        """Write the adapter and the model's configuration to a folder, each file whole or not at all."""
        self.model.config.architectures = [original_class(type(self.model)).__name__]
        with replaced_files(folder) as temporary:
            write_tensors({name: value.contiguous() for name, value in self._trained().items()}, temporary / _WEIGHTS)
            self.options.save_pretrained(str(temporary))
            self.model.config.save_pretrained(temporary)
            (temporary / CONFIG).rename(temporary / self.config_file)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Read what `save` has written to a folder into the model."""
        saved = load_file(folder / _WEIGHTS)
        for name, value in self._trained().items():
            value.copy_(saved[name])

    def merge(self) -> None:
        """Add the updates to the model's weights, after which it is like any other."""
        self._tuner.merge_and_unload(safe_merge=True)

    def _trained(self) -> dict[str, Tensor]:
        """Return what is trained, by the names in peft's files."""
        parameters = self.model.named_parameters()
        return {f"{_PREFIX}{name.replace(f'.{_NAME}.', '.')}": x.detach() for name, x in parameters if x.requires_grad}


def load_peft(what: str) -> Any:
    """Return the library; ImportError, which names `what` requires it, if it is not installed."""
    try:
        import peft
    except ImportError:
        raise ImportError(f"{what} requires peft: {install_command('lora')}") from None
    return peft


def remove_adapter(folder: Path) -> None:
    """Remove the files of an adapter from a folder."""
    for name in (ADAPTER_CONFIG, ADAPTED_CONFIG, _WEIGHTS):
        remove(folder / name)


def base_of(folder: Path) -> str:
    """Return the folder or hub id of an adapter's base model.

    Raises:
        ValueError: There are no weights of the adapter, or its configuration is damaged or names no base model.
    """
    if not (folder / _WEIGHTS).is_file():
        raise ValueError(f"{folder} holds {ADAPTER_CONFIG} and no {_WEIGHTS}: save the adapter with peft again")
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str):
        raise ValueError(f"{folder / ADAPTER_CONFIG} names no model as its base_model_name_or_path: add that")
    return base


def merge_adapter(model: PreTrainedModel, folder: Path, fresh: tuple[str, ...] = ()) -> set[str]:
    """Merge an adapter into its base model.

    Args:
        model: The base model.
        folder: Folder of the adapter.
        fresh: Parameters whose names begin with these stay as they are, also where the adapter has them.

    Returns:
        The names of the model's parameters that the adapter has.

    Raises:
        ImportError: peft is not installed.
        ValueError: The files are damaged, or do not belong to the model.
    """
    peft = load_peft(f"{folder} is an adapter, which")
    try:
        with warnings.catch_warnings(action="ignore"):  # peft's, of a base model in another folder
            saved = _weights_for(model, folder, fresh)
            options = peft.PeftConfig.from_pretrained(str(folder))
            options.task_type = None  # with which peft would look for the head of that task
            whole = [name for name in options.modules_to_save or () if any(f"{name}." in key for key in saved)]
            options.modules_to_save = whole or None
            adapted = peft.get_peft_model(model, options)
            result = peft.set_peft_model_state_dict(adapted, saved)
            lacking = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
            if strange := [*result.unexpected_keys, *lacking]:
                raise ValueError(f"{strange[0]} is only in one of them")
            adapted.merge_and_unload(safe_merge=True)
        model.requires_grad_(True)  # peft froze it
    except Exception as error:  # peft raises exceptions of many classes
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{folder}: the adapter does not belong to its base model {base_of(folder)}: {reason}"
        ) from error
    return {key.removeprefix(_PREFIX) for key in saved}


def _weights_for(model: PreTrainedModel, folder: Path, fresh: tuple[str, ...]) -> dict[str, Tensor]:
    """Read the weights of an adapter, without those of the head of another task; see `merge_adapter`."""
    state, heads = model.state_dict(), architecture_of(model.config).all_head_prefixes
    saved = _with_names_of(model, load_file(folder / _WEIGHTS))
    for key in list(saved):
        name = key.removeprefix(_PREFIX)
        if name in state and name.startswith(fresh):
            saved[key] = state[name]
        elif name not in state and name.startswith(heads):
            del saved[key]
    return saved


def _with_names_of(model: PreTrainedModel, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of an adapter by the names that they have in a model.

    The names of a model with a head begin with that of its encoder, such as "bert."; those of an encoder alone do not.
    """
    encoder, heads = f"{_PREFIX}{model.base_model_prefix}.", architecture_of(model.config).all_head_prefixes
    of_encoder = any(key.startswith(encoder) for key in saved)
    if model.base_model is model and of_encoder:
        return {
            f"{_PREFIX}{key.removeprefix(encoder)}" if key.startswith(encoder) else key: saved[key] for key in saved
        }
    if model.base_model is not model and not of_encoder:
        names = {key: key.removeprefix(_PREFIX) for key in saved}
        return {key if name.startswith(heads) else f"{encoder}{name}": saved[key] for key, name in names.items()}
    return saved


def _target_modules(model: PreTrainedModel, targets: Sequence[str]) -> list[str] | str:
    """Return which linear layers get an update: the ends of their names, or a pattern if others end like that.

    Args:
        model: The model.
        targets: See `Adapter`.
    """
    architecture = architecture_of(model.config)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    inside = [name for name in linears if f".{architecture.layers}." in f".{name}"]
    known = list(dict.fromkeys(name.rpartition(".")[2] for name in inside))
    names = list(targets)
    if not names:
        paths = (architecture.layer.get(part) for part in ("qkv", "query", "value"))
        names = [path.rpartition(".")[2] for path in paths if path]
    elif names == [ALL_LINEAR]:
        names = known
    for name in names:
        if not any(_ends_with(linear, [name]) for linear in inside):
            raise ValueError(
                f"--lora-target-modules has {name}, which is no linear layer of this model: choose among "
                f"{', '.join(known)}, or {ALL_LINEAR}"
            )
    if all(linear in inside for linear in linears if _ends_with(linear, names)):
        return names
    ends = "|".join(map(re.escape, names))
    return rf"(?:.*\.)?{re.escape(architecture.layers)}\.\d+\.(?:.*\.)?(?:{ends})"


def _ends_with(path: str, names: Collection[str]) -> bool:
    return any(f".{path}".endswith(f".{name}") for name in names)
