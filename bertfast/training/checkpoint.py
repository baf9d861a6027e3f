"""Checkpoints of a run: the model, the state of its optimizers in safetensors, and its progress in JSON; no pickle.

A checkpoint is written under a temporary name and then renamed, so that a full disk or a killed process leaves the
previous checkpoints intact. Checksums of its files detect later damage.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bertfast.data.text_files import read_json
from bertfast.models.files import save
from bertfast.runtime.atomic_write import atomic_path, link_or_copy
from bertfast.runtime.output_folder import read_record
from bertfast.runtime.tensor_file import write_tensors
from bertfast.training.checkpoint_settings import CheckpointSettings
from bertfast.training.distributed import Distributed

logger = logging.getLogger("bertfast")

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints in the output folder of a run."""
_PREFIX = "step-"
_CHECKSUMS = "checksums.json"
_ALIGNMENT = 64  # of the memory that PyTorch allocates, in bytes


def save_state(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    progress: dict[str, Any],
    keep: int,
    distributed: Distributed,
    files: Mapping[str, Path] = MappingProxyType({}),
    save_model: Callable[[Path], None] | None = None,
) -> None:
    """Write the checkpoint of a step and delete old ones. All ranks must call this; the main process writes.

    Args:
        folder: Folder of the checkpoints.
        step: Steps done.
        model: Model that is trained.
        optimizers: Its optimizers.
        progress: What else the run needs to continue, as JSON; "validation_loss" may be None.
        keep: Number of newest checkpoints to keep, in addition to the one with the lowest validation loss.
        distributed: Processes of the run.
        files: Further files that the checkpoint keeps, by their names in it; they must not be changed in place.
        save_model: Writes what is trained of the model to a folder; None: all of it is written.
    """
    weights = {name: _whole(value) for name, value in model.state_dict().items()} if save_model is None else {}
    tensors = _flatten(optimizers)
    target = folder / f"{_PREFIX}{step:08d}"

    def write() -> None:
        with atomic_path(target) as temporary:
            if save_model is None:
                save(model, temporary, weights)
            else:
                save_model(temporary)
            write_tensors(tensors, temporary / "optimizer.safetensors")
            state = json.dumps({"step": step, "progress": progress})
            (temporary / "state.json").write_text(state, encoding="utf-8")
            for name, path in files.items():
                link_or_copy(path, temporary / name)
            written = [path for path in temporary.rglob("*") if path.is_file()]
            checksums = {path.relative_to(temporary).as_posix(): _checksum(path) for path in written}
            (temporary / _CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        saved = checkpoints(folder)
        losses = {path: loss for path in saved if (loss := _validation_loss(path)) is not None}
        best = min(losses, key=losses.__getitem__, default=None)
        for old in saved[:-keep]:
            if old != best:
                shutil.rmtree(old)

    distributed.run_on_main(write)


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    found = folder.glob(f"{_PREFIX}*") if folder.is_dir() else ()
    return sorted((path for path in found if path.name.removeprefix(_PREFIX).isdecimal()), key=step_of)


def step_of(saved: Path) -> int:
    """Return the number of steps done at a checkpoint, which its name says."""
    return int(saved.name.removeprefix(_PREFIX))


def newest_whole(folder: Path, before: float = math.inf) -> Path | None:
    """Return the newest intact checkpoint and log the names of damaged newer ones; None: there is none.

    Args:
        folder: Folder of the checkpoints.
        before: Step; the checkpoint must be of an earlier one.
    """
    found, damaged = None, {}
    for saved in reversed(checkpoints(folder)):
        if step_of(saved) < before:
            if not (faults := _damaged(saved)):
                found = saved
                break
            damaged[saved] = ", ".join(faults)
    instead = "" if found is None else f": continuing from {found.name}"
    for saved, names in damaged.items():
        logger.warning("%s is damaged (%s)%s", saved, names, instead)
    return found


def has_begun(output: Path) -> bool:
    """Return whether a run has begun in a folder, so that a program that repeats it must resume it."""
    return read_record(output) is not None


def checkpoint_to_resume(output: Path) -> Path | None:
    """Return the checkpoint from which a run with --resume continues; None, with a warning: there is none.

    Args:
        output: Output folder of the run.

    Raises:
        ValueError: Every checkpoint is damaged.
    """
    folder = output / CHECKPOINTS
    if not checkpoints(folder):
        logger.warning("there is no checkpoint in %s: starting from step 0", output)
        return None
    newest = newest_whole(folder)
    if newest is None:
        raise ValueError(
            f"every checkpoint in {folder} is damaged: start again with another --output-dir or --overwrite-output-dir"
        )
    return newest


def how_to_continue(settings: CheckpointSettings) -> str:
    """Return, for the message of a run that was stopped with a checkpoint, what continues it."""
    return f"with a checkpoint: the same command{' with --resume' * (not settings.resume)} continues the run"


def holds(output: Path, what: str) -> ValueError:
    """Return the error of a new run in the output folder of another one.

    Args:
        output: Output folder of the run.
        what: What the folder holds.
    """
    return ValueError(
        f"{output} already holds a {what}, choose another --output-dir, or pass --overwrite-output-dir to replace it"
    )


def read_progress(saved: Path) -> tuple[int, dict[str, Any]]:
    """Return the number of steps done at a checkpoint, and the run's progress.

    Raises:
        OSError: The file that holds them is missing.
        ValueError: It is damaged; the message names it.
    """
    state = read_json(saved / "state.json")
    step, progress = state.get("step"), state.get("progress")
    if not isinstance(step, int) or not isinstance(progress, dict):
        raise ValueError(f"{saved / 'state.json'} is damaged: it has no step and progress")
    return step, progress


def _validation_loss(saved: Path) -> float | None:
    """Return the validation loss of a checkpoint; None: it has none, or is damaged."""
    try:
        return read_progress(saved)[1].get("validation_loss")
    except (OSError, ValueError):
        return None


def load_state(saved: Path, optimizers: list[Optimizer]) -> None:
    """Restore the state of optimizers, bitwise identical; they must be built like those of the checkpoint."""
    with safe_open(saved / "optimizer.safetensors", framework="pt") as file:
        for number, optimizer in enumerate(optimizers):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states: dict[int, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                owner, parameter, name = key.split(".", 2)
                if int(owner) == number:
                    value = _distribute_like(parameters[int(parameter)], file.get_tensor(key))
                    states.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def align_parameters(model: nn.Module) -> None:
    """Move parameters to memory of their own, as PyTorch allocates it.

    Those of a loaded model are slices of the file's bytes. Their alignment, which changes when the file does, decides
    which instructions a GEMM of MKL takes, and with them the rounding of its results.
    """
    for parameter in model.parameters():
        if parameter.data_ptr() % _ALIGNMENT:
            parameter.data = parameter.data.clone()


def _flatten(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Return the whole state tensors of optimizers by "optimizer.parameter.name"."""
    return {
        f"{number}.{parameter}.{name}": _whole(value).contiguous()
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _whole(value: Tensor) -> Tensor:
    """Return a tensor that is not sharded."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def _distribute_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Shard a state tensor like its parameter."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _damaged(saved: Path) -> list[str]:
    """Return the names of a checkpoint's files that are missing or have another checksum."""
    try:
        checksums = read_json(saved / _CHECKSUMS)
    except (OSError, ValueError):
        return [_CHECKSUMS]
    if "state.json" not in checksums:
        return [_CHECKSUMS]
    return [name for name, sum in checksums.items() if not (saved / name).is_file() or _checksum(saved / name) != sum]


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
