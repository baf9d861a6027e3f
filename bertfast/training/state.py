"""The state of a run on disk: a model's folder, its optimizers' tensors in safetensors, the rest in JSON; no pickle.

A checkpoint is written under a temporary name and renamed, so one that is there is whole, and a full disk or a killed
process leaves the one before it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from torch.optim import Optimizer

from bertfast import checkpoint
from bertfast.models import BertPreTrainedModel

_PREFIX = "step-"


def save_state(
    folder: Path, step: int, model: BertPreTrainedModel, optimizers: list[Optimizer], progress: dict, keep: int
) -> Path:
    """Write the checkpoint of `step` into `folder` and remove all but the newest `keep`; returns its folder.

    `progress` is whatever else the run must know to go on, as JSON.
    """
    target = folder / f"{_PREFIX}{step:08d}"
    temporary = folder / f".{target.name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model.save_pretrained(temporary)
        tensors, groups = _flatten(optimizers)
        checkpoint.write_tensors(tensors, temporary / "optimizer.safetensors")
        state = {"step": step, "progress": progress, "groups": groups}
        (temporary / "state.json").write_text(json.dumps(state), encoding="utf-8")
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def read_progress(saved: Path) -> tuple[int, dict]:
    """(steps done, what the run noted) of a checkpoint."""
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    return state["step"], state["progress"]


def load_state(saved: Path, model: BertPreTrainedModel, optimizers: list[Optimizer]) -> None:
    """Put model and optimizers back to where the checkpoint left them, to the last bit."""
    checkpoint.load_weights(model, checkpoint.read_weights(saved), str(saved))
    groups = json.loads((saved / "state.json").read_text(encoding="utf-8"))["groups"]
    if len(groups) != len(optimizers):
        raise ValueError(f"{saved} is of {len(groups)} optimizers, this run has {len(optimizers)}")
    with safe_open(saved / "optimizer.safetensors", framework="pt") as file:
        for number, (optimizer, saved_groups) in enumerate(zip(optimizers, groups, strict=True)):
            states: dict[int, dict[str, torch.Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                owner, parameter, name = key.split(".", 2)
                if int(owner) == number:
                    states.setdefault(int(parameter), {})[name] = file.get_tensor(key)
            optimizer.load_state_dict({"state": states, "param_groups": saved_groups})


def _flatten(optimizers: list[Optimizer]) -> tuple[dict[str, torch.Tensor], list]:
    tensors, groups = {}, []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        groups.append(state["param_groups"])
        for parameter, values in state["state"].items():
            for name, value in values.items():
                tensors[f"{number}.{parameter}.{name}"] = value.contiguous()
    return tensors, groups
