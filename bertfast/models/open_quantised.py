"""Open the folder or hub id of a quantised model where `from_pretrained` of a fused or an Auto class is called."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from bertfast.architectures import Architecture, families, family_by_type
from bertfast.models.config_checks import check_config
from bertfast.models.families import architecture_of, model_classes
from bertfast.models.files import resolve
from bertfast.models.freeze import fused_encoders
from bertfast.models.quantised_config import is_quantised, unmark
from bertfast.models.quantised_files import has_quantised_weights, read_dequantised, restore_quantised
from bertfast.models.registry import FusedModel
from bertfast.models.weight_checks import check_loaded
from bertfast.models.weights import CONFIG, config_path, variant_files

_HUB = ("cache_dir", "revision", "token", "local_files_only")
# Arguments of `from_pretrained` that stand for other weights, names of weights or kinds of quantisation.
_OTHER_WEIGHTS = ("state_dict", "key_mapping", "quantization_config")
# The folder in the report of transformers 5, and of 4, of missing weights if it was given weights without one.
_UNNAMED = re.compile(r"(?<= from: )None(?=\n)|(?<= checkpoint at )None(?= )")


def quantised_folder(name: Any, options: Mapping[str, Any]) -> Path | None:
    """Return the folder of a quantised model, a local copy if it is on the hub; None: the model is not quantised.

    Args:
        name: Its folder or hub id, or None.
        options: Arguments of `from_pretrained`.

    Raises:
        ValueError: Its `quantization_config` is not one that this version knows.
    """
    if name is None or options.get("gguf_file") is not None:
        return None
    hub = {key: options[key] for key in _HUB if options.get(key) is not None}
    inner = options.get("subfolder") or ""
    try:
        values, _ = PretrainedConfig.get_config_dict(str(name), subfolder=inner, **hub)
    except Exception:  # of many classes; what opens the model raises it again
        return None
    if not is_quantised(values, str(Path(str(name), inner, CONFIG))):
        # In a folder, weights count, too: else transformers would initialise all layers whose weights are int8.
        folder = Path(str(name), inner)
        return folder if has_quantised_weights(folder) else None
    return resolve(name, **hub) / inner


def open_quantised(
    folder: Path,
    config_class: Any,
    class_of: Callable[[Any], Any],
    fuse: Callable[[Any], Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Open a quantised model; what its files hold in floating point keeps its dtype.

    Args:
        folder: Its folder.
        config_class: Class of its configuration.
        class_of: Returns the model's class for a configuration.
        fuse: Returns a model that is fused.
        args, kwargs: Arguments of `from_pretrained`.

    Returns:
        The model; with `output_loading_info=True` a pair of it and transformers' loading information.

    Raises:
        FileNotFoundError: There are no weights, or none of the variant.
        TypeError: `config` is neither a configuration nor a path.
        ValueError: The files are damaged or do not belong together, or the arguments are of other weights.
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in (*_HUB, "subfolder", "force_download")}
    # As in transformers, "auto" is the dtype of the files; a configuration must not take it for its own.
    dtypes = [kwargs.pop(key, None) for key in ("dtype", "torch_dtype")]
    dtype = next((each for each in dtypes if each is not None), "auto")
    _refuse_other_weights(folder, kwargs)
    config, kwargs = _config(folder, config_class, **kwargs)
    variant = kwargs.pop("variant", None)
    if variant is not None and not any((folder / name).is_file() for name in variant_files(variant)):
        raise FileNotFoundError(
            f"{folder} has no {variant_files(variant)[0]}: leave variant={variant!r} out, or name one that it has"
        )
    is_marked = is_quantised(config)
    unmark(config)
    weights, quantised = read_dequantised(folder, str(folder), variant, is_marked)
    returns_info, takes_other_heads = (
        kwargs.pop(key, False) for key in ("output_loading_info", "ignore_mismatched_sizes")
    )
    kwargs |= {"dtype": dtype, "config": config, "state_dict": weights}
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # what is refused is checked below
    with _named_in_reports(folder):
        model, info = class_of(config).from_pretrained(None, *args, **kwargs)
    model = fuse(model)
    if not fused_encoders(model):
        raise ValueError(
            f"{folder}: config.json describes a {type(model).__name__}, which cannot be quantised: take the "
            "config.json that belongs to the weights"
        )
    heads = architecture_of(config).all_head_prefixes if takes_other_heads else ()
    other_head = ", or pass ignore_mismatched_sizes=True for a new head"
    check_loaded(model, str(folder), info, weights, heads, other_head=other_head)
    model.name_or_path = model.config.name_or_path = str(folder)
    weights.clear()  # the model's own, which are freed when they are packed
    restore_quantised(model, quantised, str(folder))
    return (model, info) if returns_info else model


def _refuse_other_weights(folder: Path, options: Mapping[str, Any]) -> None:
    """Raise ValueError if arguments of `from_pretrained` concern other weights than those of the folder."""
    other = next((key for key in _OTHER_WEIGHTS if options.get(key) is not None), None)
    if other is not None or options.get("use_safetensors") is False:
        raise ValueError(
            f"{folder} has the weights of an int8 model, which are opened as they are: leave "
            f"{other or 'use_safetensors'} out, or open the model from which it was quantised"
        )


def _config(folder: Path, config_class: Any, config: Any = None, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
    """Return the configuration of a quantised model, and the arguments of `from_pretrained` that it does not take.

    Args:
        folder: The model's folder.
        config_class: Class of the configuration.
        config: A configuration, or the path of one, to use instead; None: that of the folder.
        kwargs: The other arguments.

    Raises:
        TypeError: `config` is of another type.
        ValueError: The configuration is not that of a model that can be quantised.
    """
    source = folder if config is None else config
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        where = str(config_path(path) if path.is_dir() else path)
        try:
            config, kwargs = config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
        except OSError:  # it says that there is none
            raise
        except Exception as error:  # transformers' validation raises exceptions of many classes
            raise ValueError(f"{where}: this is no configuration of a model: {' '.join(str(error).split())}") from error
    elif isinstance(source, PretrainedConfig):
        config, where = copy.deepcopy(source), "config"
    else:
        raise TypeError(f"config must be a configuration or the path of one, got a {type(source).__name__}")
    if not is_quantised(config, where) and getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{where}: its quantization_config is not that of bertfast, as the weights are: take the config.json that "
            "belongs to the weights"
        )
    family = family_by_type(config.model_type)
    if family is not None:
        check_config(config, family, where)
        _require_class_of_family(config, family, where)
    return config, kwargs


def _require_class_of_family(config: PretrainedConfig, family: Architecture, source: str) -> None:
    """Raise ValueError if a configuration names a class of another family than its own, as after a wrong change."""
    named = next(iter(config.architectures or []), None)
    if named in model_classes(family):
        return
    if any(named in model_classes(other) for other in families()):
        raise ValueError(
            f"{source} has the model_type {config.model_type!r}, and the architecture {named!r} of another: take the "
            "config.json that belongs to the weights"
        )


@contextmanager
def _named_in_reports(folder: Path) -> Iterator[None]:
    """Have transformers name a folder whose weights it is given, also in a report of missing weights."""

    def name(record: logging.LogRecord) -> bool:
        if isinstance(record.msg, str):
            record.msg = _UNNAMED.sub(lambda match: str(folder), record.msg, count=1)
        return True

    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(name)
    try:
        yield
    finally:
        reports.removeFilter(name)


def _open_as(cls: Any, name: Any, *args: Any, **kwargs: Any) -> Any:
    """Open a model as a fused class if it is quantised, else return None."""
    folder = quantised_folder(name, kwargs)
    if folder is None:
        return None
    return open_quantised(folder, cls.config_class, lambda config: cls, lambda model: model, *args, **kwargs)


FusedModel.open_quantised = staticmethod(_open_as)
