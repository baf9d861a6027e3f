"""Open the folder or hub id of a quantised model where `from_pretrained` of a fused or an Auto class is called."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from bertfast.models.files import resolve
from bertfast.models.quantised_config import is_quantised, unmark
from bertfast.models.quantised_files import read_dequantised, restore_quantised
from bertfast.models.registry import FusedModel

_HUB = ("cache_dir", "revision", "token", "local_files_only")
# The folder in the report of transformers 5, and of 4, of missing weights if it was given weights without one.
_UNNAMED = re.compile(r"(?<= from: )None(?=\n)|(?<= checkpoint at )None(?= )")


def quantised_folder(name: Any, options: Mapping[str, Any]) -> Path | None:
    """Return the folder of a quantised model, a local copy if it is on the hub; None: the model is not quantised.

    Args:
        name: Its folder or hub id, or None.
        options: Arguments of `from_pretrained`.
    """
    if name is None or options.get("gguf_file") is not None:
        return None
    hub = {key: options[key] for key in _HUB if options.get(key) is not None}
    inner = options.get("subfolder") or ""
    try:
        values, _ = PretrainedConfig.get_config_dict(str(name), subfolder=inner, **hub)
    except Exception:  # of many classes; what opens the model raises it again
        return None
    return resolve(name, **hub) / inner if is_quantised(values) else None


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
    """
    kwargs = {key: value for key, value in kwargs.items() if key not in (*_HUB, "subfolder", "force_download")}
    # As in transformers, "auto" is the dtype of the files; a configuration must not take it for its own.
    dtypes = [kwargs.pop(key, None) for key in ("dtype", "torch_dtype")]
    dtype = next((each for each in dtypes if each is not None), "auto")
    config = copy.deepcopy(kwargs.pop("config", None))
    if config is None:
        config, kwargs = config_class.from_pretrained(folder, return_unused_kwargs=True, **kwargs)
    unmark(config)
    weights, quantised = read_dequantised(folder, str(folder), kwargs.pop("variant", None))
    kwargs |= {"dtype": dtype, "config": config, "state_dict": weights}
    with _named_in_reports(folder):
        loaded = class_of(config).from_pretrained(None, *args, **kwargs)
    model = fuse(loaded[0] if isinstance(loaded, tuple) else loaded)
    model.name_or_path = model.config.name_or_path = str(folder)
    weights.clear()  # the model's own, which are freed when they are packed
    restore_quantised(model, quantised)
    return (model, *loaded[1:]) if isinstance(loaded, tuple) else model


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
