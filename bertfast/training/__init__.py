"""Pre-training, fine-tuning and evaluation.

`finetune` and `pretrain` do what the commands of these names do, with settings of the same names as their flags:

    from bertfast.training import FinetuneSettings, finetune

    settings = FinetuneSettings.of(model_name_or_path="bert", train_file="train.tsv", output_dir="tuned")
    results = finetune(settings.replace(learning_rate=2e-5))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bertfast.training.finetune_settings import FinetuneSettings
    from bertfast.training.finetuning import finetune
    from bertfast.training.pretrain_settings import PretrainSettings
    from bertfast.training.pretraining import pretrain

__all__ = ["FinetuneSettings", "PretrainSettings", "finetune", "pretrain"]

_MODULES = {
    "FinetuneSettings": "finetune_settings",
    "PretrainSettings": "pretrain_settings",
    "finetune": "finetuning",
    "pretrain": "pretraining",
}


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})


def __getattr__(name: str) -> object:
    # Imported on first use: each submodule imports this package, and those of settings need neither training loop.
    if name not in _MODULES:
        raise AttributeError(f"module 'bertfast.training' has no attribute {name!r}")
    return getattr(importlib.import_module(f"bertfast.training.{_MODULES[name]}"), name)
