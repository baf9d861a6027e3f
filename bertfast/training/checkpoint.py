"""The state of a run on disk: a model's folder, its optimizers' tensors in safetensors, the rest in JSON; no pickle.

A checkpoint is written under a temporary name and renamed, so that one which is there was written whole: a full disk or
a killed process leaves the one before it. It carries its files' checksums, by which what was damaged later is known.
"""

from __future__ import annotations

import json
import shutil
import zlib
from pathlib import Path

from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bertfast.models.files import save, write_tensors
from bertfast.training.distributed import Distributed

_PREFIX = "step-"
_CHECKSUMS = "checksums.json"


def save_state(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: list[Optimizer],
    progress: dict,
    keep: int,
    distributed: Distributed,
) -> None:
    """Write the checkpoint of `step` into `folder`; of the older ones stay the newest `keep` and the best.

    `progress` is whatever else the run must know to go on, as JSON; "validation_loss" in it says which is the best. All
    ranks take part, and the first writes.
    """
    weights = {name: _whole(value) for name, value in model.state_dict().items()}
    tensors = _flatten(optimizers)
    target = folder / f"{_PREFIX}{step:08d}"

    def write() -> None:
        temporary = folder / f".{target.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            save(model, temporary, weights)
            write_tensors(tensors, temporary / "optimizer.safetensors")
            state = json.dumps({"step": step, "progress": progress})
            (temporary / "state.json").write_text(state, encoding="utf-8")
            checksums = {file.name: _checksum(file) for file in temporary.iterdir()}
            (temporary / _CHECKSUMS).write_text(json.dumps(checksums), encoding="utf-8")
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        saved = checkpoints(folder)
        judged = [path for path in saved if _validation_loss(path) is not None]
        best = min(judged, key=_validation_loss, default=None)
        for old in saved[:-keep]:
            if old != best:
                shutil.rmtree(old)

    distributed.run_on_main(write)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*")) if folder.is_dir() else []


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint whose files are as they were written; those that are not are named. None: there is none."""
    for saved in reversed(checkpoints(folder)):
        damaged = _damaged(saved)
        if not damaged:
            return saved
        print(f"{saved} is damaged ({', '.join(damaged)}): the checkpoint before it is taken")
    return None


def read_progress(saved: Path) -> tuple[int, dict]:
    """(steps done, what the run noted) of a checkpoint."""
    state = json.loads((saved / "state.json").read_text(encoding="utf-8"))
    return state["step"], state["progress"]


def load_state(saved: Path, optimizers: list[Optimizer]) -> None:
    """Put the optimizers, made as the checkpoint's were, back to where it left them, to the last bit."""
    with safe_open(saved / "optimizer.safetensors", framework="pt") as file:
        for number, optimizer in enumerate(optimizers):
            owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            states: dict[int, dict[str, Tensor]] = {}
            for key in file.keys():  # noqa: SIM118 - not a dict
                owner, parameter, name = key.split(".", 2)
                if int(owner) == number:
                    value = _as(owned[int(parameter)], file.get_tensor(key))
                    states.setdefault(int(parameter), {})[name] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": states})


def _flatten(optimizers: list[Optimizer]) -> dict[str, Tensor]:
    return {
        f"{number}.{parameter}.{name}": _whole(value).contiguous()
        for number, optimizer in enumerate(optimizers)
        for parameter, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _as(parameter: Tensor, value: Tensor) -> Tensor:
    """A state of a parameter, shared among the ranks as that is."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape:
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
    return value


def _validation_loss(saved: Path) -> float | None:
    return read_progress(saved)[1]["validation_loss"]


def _damaged(saved: Path) -> list[str]:
    """The files of a checkpoint that are missing or not as they were written."""
    try:
        checksums = json.loads((saved / _CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return [_CHECKSUMS]
    return [name for name, sum in checksums.items() if not (saved / name).is_file() or _checksum(saved / name) != sum]


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value
