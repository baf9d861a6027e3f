"""Find, open and save the folders of models; errors say in one sentence what is wrong with a folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, BertConfig, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from bertfast.architectures import BERT, FAMILIES, family_by_type, version_unsupported_reason
from bertfast.architectures.initialise import initialise
from bertfast.data.text_files import read_json
from bertfast.data.tokenizer import TOKENIZER_FILES
from bertfast.models import bert, families
from bertfast.models.adapters import base_of, merge_adapter
from bertfast.models.config_checks import check_config, check_entries
from bertfast.models.extensions import VARIANT, ExtendedBertConfig, ModelT, class_for
from bertfast.models.quantised_config import is_quantised, unmark
from bertfast.models.quantised_files import read_dequantised, restore_quantised
from bertfast.models.weight_checks import check_loaded
from bertfast.models.weights import ADAPTED_CONFIG, ADAPTER_CONFIG, CONFIG, config_path, is_adapter, separate_tied
from bertfast.runtime.display import require_utf8
from bertfast.runtime.tensor_file import replaced_files

logger = logging.getLogger("bertfast")


def resolve(name: str | Path, **hub: Any) -> Path:
    """Return the folder of a model: one that exists, or the local copy of a hub id.

    Args:
        name: Folder or hub id.
        hub: Arguments of `snapshot_download`, such as the revision.

    Raises:
        FileNotFoundError: There is neither.
        NotADirectoryError: It is a file.
        ValueError: Its name is not UTF-8, as safetensors needs it.
    """
    require_utf8(str(name), "model")
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_file():
        raise NotADirectoryError(
            f"{name} is a file; a model is a folder with config.json and weights: give {Path(name).parent} or another "
            "folder"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    files = ["*.json", "*.safetensors", "pytorch_model*.bin", "*/pytorch_model.bin", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, **hub))
    except HFValidationError:
        raise FileNotFoundError(f"{name} is not a folder, and not the id of a model on the hub (OWNER/NAME)") from None
    except Exception as error:  # of the network or the hub
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(
            f"{name} is not a folder, and not a model that can be downloaded from the hub: {reason}"
        ) from error


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model's folder that determine its outputs: configuration, weights and tokenizer."""
    patterns = (CONFIG, ADAPTED_CONFIG, ADAPTER_CONFIG, "*.safetensors", "pytorch_model*.bin", *TOKENIZER_FILES)
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def read_config(folder: str | Path, /, *, source: str | None = None, **changes: Any) -> BertConfig:
    """Read a model's configuration.

    Args:
        folder: Folder with a `config.json`.
        source: The flag that the changes are from, for messages about entries; None: the file is named.
        changes: Entries to set under the names that BERT has for them, also those that it does not know. Extensions
            make it an `ExtendedBertConfig`.

    Raises:
        FileNotFoundError: There is no `config.json`.
        ValueError: It cannot be read, or is that of an unknown family.
    """
    path = config_path(Path(folder))
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no config.json, so it is not a model's folder")
    values = read_json(path)
    model_type = values.pop("model_type", "bert")
    architecture = family_by_type("bert" if model_type == ExtendedBertConfig.model_type else str(model_type))
    if architecture is None:
        reason = version_unsupported_reason(str(model_type))
        if reason is not None:
            raise ValueError(f"{path} is the configuration of a {model_type} model: {reason}")
        known = ", ".join(name.replace("_", "-") for name in FAMILIES)
        raise ValueError(f"{path} is the configuration of a {model_type!r} model, not of a BERT or one of {known}")
    changes = {architecture.config_name(name): value for name, value in changes.items()}
    if "id2label" in changes:  # transformers takes the number of labels from it
        changes["label2id"] = {label: index for index, label in changes["id2label"].items()}
        changes.pop("num_labels", None)
    if changes.keys() & {"id2label", "num_labels"}:
        values = {name: x for name, x in values.items() if name not in ("id2label", "label2id", "num_labels")}
    values |= changes
    # Folders from before extensions had a model type of their own have "bert", and the extension's field.
    is_extended = model_type == ExtendedBertConfig.model_type or any(map(values.get, ExtendedBertConfig.extensions))
    if is_extended and architecture.model_type != "bert":
        extensions = ", ".join(filter(values.get, ExtendedBertConfig.extensions))
        raise ValueError(f"{path} is that of a {model_type}, and only BERT can have {extensions}")
    kind: Any = ExtendedBertConfig if is_extended else CONFIG_MAPPING[architecture.model_type]
    return config_from(values, source or path, kind)


def config_from(values: dict[str, Any], source: str | Path, kind: type[BertConfig] = BertConfig) -> BertConfig:
    """Make a configuration of its entries.

    Args:
        values: The entries.
        source: The file or the flag that they are from.
        kind: Class of the configuration.

    Raises:
        ValueError: They are not those of such a model; the message names `source`.
    """
    architecture = family_by_type(kind.model_type) or BERT
    check_entries(values, architecture, source)
    is_quantised(values, str(source))  # raises ValueError if the entry for it is wrong
    try:
        config: BertConfig = kind.from_dict(values)
    except Exception as error:  # transformers' validation raises exceptions of many classes
        family, reason = "BERT" if architecture is BERT else architecture.model_type, " ".join(str(error).split())
        raise ValueError(f"{source}: this is not the configuration of a {family}: {reason}") from error
    check_config(config, architecture, source)
    return config


def new_model(kind: type[ModelT], config: BertConfig) -> ModelT:
    """Return a model with random weights, in training mode, on the CPU; they depend on torch's seed.

    Args:
        kind: A fused class; if the configuration has extensions, its counterpart with extensions is built.
        config: Configuration of the model.
    """
    model = class_for(kind, config)(config)
    if not families.architecture_of(config).pre_norm:  # whose own initialisation depends on the number of layers
        initialise(model)
    return model


def load(
    kind: type[ModelT],
    name: str | Path,
    config: BertConfig | None = None,
    *,
    fresh: tuple[str, ...] = (),
    takes_quantised: bool = False,
) -> tuple[ModelT, list[str], list[str]]:
    """Open a model in fp32 and in evaluation mode, on the CPU; an adapter of peft is merged into its base model.

    Args:
        kind: A fused class; if the configuration has extensions, its counterpart with extensions is opened.
        name: Folder or hub id.
        config: Configuration of the model; None: that of the folder. If it ties weights that differ, it is changed.
        fresh: Parameters whose names begin with these are initialised, also where the checkpoint has them.
        takes_quantised: Whether the model may be one that `bertfast.quantize` quantised; it is opened as that.

    Returns:
        The model, the names of parameters that the checkpoint lacks, which are initialised as in pre-training, and
        those of weights that the model does not have.

    Raises:
        FileNotFoundError: There are no weights.
        ValueError: They are damaged, of other sizes or types, not those of a BERT, or more than config.json describes.
    """
    folder = resolve(name)
    config = read_config(folder) if config is None else config
    if is_adapter(folder):
        return _open_adapter(kind, folder, config, fresh)
    model_class: Any = class_for(kind, config)
    variant = VARIANT if isinstance(config, ExtendedBertConfig) else None
    is_marked = is_quantised(config, str(config_path(folder)))
    weights, quantised = read_dequantised(folder, str(name), variant, is_marked, takes_quantised)
    unmark(config)
    if kind._tied_weights_keys:
        separate_tied(weights, config, model_class.base_model_prefix, str(name))
    try:
        with _quiet():  # the caller decides what may be missing
            model, info = model_class.from_pretrained(
                None,
                config=config,
                state_dict=weights,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
    except (ArithmeticError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name}: its config.json does not describe a model with its weights: {error}") from error
    missing, unexpected = check_loaded(model, str(name), info, weights, fresh)
    model.name_or_path = model.config.name_or_path = str(folder)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_dict(read_json(folder / "generation_config.json"))
    initialise(model, {*missing, *(key for key in model.state_dict() if key.startswith(fresh))})
    if quantised:
        weights.clear()  # the model's own, which are freed when they are packed
        restore_quantised(model, quantised, str(name))
    return model.eval(), missing, unexpected


def _open_adapter(
    kind: type[ModelT], folder: Path, config: BertConfig, fresh: tuple[str, ...]
) -> tuple[ModelT, list[str], list[str]]:
    """Open the base model of an adapter, and merge the adapter into it; see `load`."""
    try:
        base = resolve(base_of(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}: the base model of the adapter in {folder} (see {ADAPTER_CONFIG})") from None
    heads = families.architecture_of(config).head_prefixes(class_for(kind, config))
    model, missing, unexpected = load(kind, base, config, fresh=heads)
    merged = merge_adapter(model, folder, fresh)
    return model, [key for key in missing if key not in merged], unexpected


def report_differences(model: PreTrainedModel, name: str, missing: list[str], unexpected: list[str]) -> None:
    """Warn of parameters that a checkpoint lacks, and of weights that the model does not have."""
    if missing:
        logger.warning("%s has no %s: newly initialised", name, ", ".join(missing))
    if unexpected:
        logger.warning("%s also holds %s: not used by %s", name, ", ".join(unexpected), type(model).__name__)


def save(model: PreTrainedModel, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model's folder as `save_pretrained` does, each file whole or not at all.

    Args:
        model: The model.
        folder: Folder to write to; it is made if it is missing.
        weights: The model's state if that is not in its own tensors, as when it was gathered from several ranks.

    Raises:
        OSError: The files cannot be written; what was saved before is kept.
    """
    if weights is not None:
        weights = {key: value for key, value in weights.items() if key not in _tied(model)}
    with _quiet(), replaced_files(Path(folder)) as temporary:
        model.save_pretrained(temporary, state_dict=weights)


@contextmanager
def _quiet() -> Iterator[None]:
    """Have transformers log errors only, and draw no progress bars."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def _tied(model: PreTrainedModel) -> set[str]:
    """Return the names of tied parameters, except for the first name of each."""
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - {*dict(model.named_parameters())}


def class_named_by(config: BertConfig, folder: Path) -> type[PreTrainedModel]:
    """Return the fused class that the configuration of a folder names, the family's encoder if it names none.

    Raises:
        ValueError: The class that it names is not one of bertfast.
    """
    architecture = families.architecture_of(config)
    known = families.model_classes(architecture)
    name = next(iter(config.architectures or [f"{architecture.prefix}Model"]))
    if name not in known:
        raise ValueError(f"{folder / 'config.json'} names {name}, which is none of {', '.join(sorted(known))}")
    kind: type[PreTrainedModel] = getattr(bert if architecture is BERT else families, name)
    return kind
