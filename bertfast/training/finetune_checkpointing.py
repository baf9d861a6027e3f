"""Checkpoints of a fine-tuning run: its progress, the best model so far, and the state of the random generators."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from bertfast.models.adapters import Adapter
from bertfast.runtime.atomic_write import link_or_copy, named_in_errors, remove
from bertfast.runtime.generator_state import generator_state, set_generator_state
from bertfast.training.checkpoint import (
    CHECKPOINTS,
    checkpoint_to_resume,
    checkpoints,
    load_state,
    read_progress,
    save_state,
)
from bertfast.training.distributed import Distributed
from bertfast.training.finetune_folder import PREDICTIONS, RESULTS
from bertfast.training.finetune_model import score_of
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.step_results import StepResults

_BEST_FILES = ("config.json", "model*.safetensors*", "adapter_*", *PREDICTIONS)
_BEST = "best"  # the folder of a checkpoint that holds them


@dataclass
class FinetuneProgress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        tokens: Tokens of these steps.
        seconds: Training time in seconds, validation and checkpoints excluded.
        learning_rate: Learning rate of the last step.
        validated_step: Step of the last validation; 0: there was none.
        validations_without_better: Validations since the best model.
        best_step: Step of the best model; 0: there is none yet.
        best_score: Score of the best model, higher is better, and its negative loss, which breaks ties.
        best_metrics: Metrics of the best model.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    learning_rate: float = 0.0
    validated_step: int = 0
    validations_without_better: int = 0
    best_step: int = 0
    best_score: tuple[float, float] = (-math.inf, -math.inf)
    best_metrics: dict[str, float] = field(default_factory=dict)

    def improves(self, metrics: dict[str, float], metric: str) -> bool:
        """Return whether the model is the best so far; count validations in which it is not.

        Args:
            metrics: Metrics of a validation after the last step.
            metric: Name of the metric that decides; the loss decides between equal values.
        """
        if (score := score_of(metrics, metric)) <= self.best_score:
            self.validations_without_better += 1
            return False
        self.best_score, self.best_metrics, self.validations_without_better = score, metrics, 0
        return True

    def summary(self, epoch: float, samples: int, results: StepResults) -> dict[str, float]:
        """Return what a finished run reports of its training and of its best model.

        Args:
            epoch: Passes over the training data.
            samples: Number of examples in it.
            results: Results of the steps.
        """
        return {
            "epoch": epoch,
            "best_step": self.best_step,
            **self.best_metrics,
            "train_samples": samples,
            "train_loss": results.mean(),
            "train_runtime": self.seconds,
            "train_tokens_per_second": self.tokens / self.seconds,
            **({"skipped_steps": results.skipped} if results.skipped else {}),
        }

    def save(
        self,
        settings: FinetuneSettings,
        model: PreTrainedModel,
        optimizers: list[Optimizer],
        results: StepResults,
        precision: str,
        distributed: Distributed,
        adapter: Adapter | None = None,
    ) -> None:
        """Write a checkpoint of the run; all ranks must call this.

        Args:
            settings: Settings of the run.
            model: Model that is trained.
            optimizers: Its optimizers.
            results: Results of the steps; all of them must have been read.
            precision: fp32 or bf16.
            distributed: Processes of the run.
            adapter: Its adapter if only that is trained.
        """
        output = Path(settings.output_dir)
        values = {
            "run": asdict(self),
            "results": results.state(),
            "random": distributed.gather(_random_state(distributed.device)),
            "precision": precision,
        }
        best = [path for pattern in _BEST_FILES for path in output.glob(pattern)] if self.best_step else []
        save_state(
            output / CHECKPOINTS,
            self.step,
            model,
            optimizers,
            values,
            settings.checkpoint.save_total_limit,
            distributed,
            {f"{_BEST}/{path.name}": path for path in best},
            None if adapter is None else adapter.save,
        )

    @classmethod
    def restore(
        cls, saved: Path, output: Path, optimizers: list[Optimizer], results: StepResults, distributed: Distributed
    ) -> FinetuneProgress:
        """Load optimizers, results of the steps and random generators of a checkpoint; return its progress.

        The best model at that time replaces the one in the output folder, which may be of a later step.

        Args:
            saved: Folder of the checkpoint.
            output: Output folder of the run.
            optimizers: Optimizers of the model, built like those of the checkpoint.
            results: Results of the steps.
            distributed: Processes of the run.

        Raises:
            ValueError: The checkpoint is of another number of processes.
        """
        _, values = read_progress(saved)
        if (processes := len(values["random"])) != distributed.world_size:
            raise ValueError(
                f"{saved} was written by {processes} processes and is read by {distributed.world_size}: start "
                f"{processes} (torchrun --nproc-per-node {processes})"
            )
        load_state(saved, optimizers)
        results.restore(values["results"])
        _set_random_state(values["random"][distributed.rank], distributed.device)
        if distributed.is_main:
            remove_best_model(output)
            with named_in_errors(output):
                for path in (saved / _BEST).glob("*"):
                    link_or_copy(path, output / path.name)
        progress = cls(**values["run"])
        progress.best_score = progress.best_score[0], progress.best_score[1]  # JSON has lists only
        return progress


def saved_run(settings: FinetuneSettings) -> Path | None:
    """Return the checkpoint from which a run continues; None: it starts from the beginning, or is finished.

    Raises:
        ValueError: Every checkpoint is damaged.
    """
    output = Path(settings.output_dir)
    if not settings.checkpoint.resume or ((output / RESULTS).exists() and not checkpoints(output / CHECKPOINTS)):
        return None
    return checkpoint_to_resume(output)


def saved_precision(saved: Path) -> Any:
    """Return the precision of the run of a checkpoint."""
    return read_progress(saved)[1]["precision"]


def remove_best_model(output: Path) -> None:
    """Remove the best model and its predictions from an output folder."""
    with named_in_errors(output):
        for path in [path for pattern in _BEST_FILES for path in output.glob(pattern)]:
            remove(path)


def _random_state(device: torch.device) -> dict[str, str]:
    """Return the states of the generators that a run draws from, by type of device, in hexadecimal digits."""
    return {name: generator_state(of).numpy().tobytes().hex() for name, of in _drawn_from(device).items()}


def _set_random_state(states: dict[str, str], device: torch.device) -> None:
    """Restore what `_random_state` has returned; a generator that the run did not have stays as it is."""
    for name, of in _drawn_from(device).items():
        if name in states:
            set_generator_state(of, torch.tensor(list(bytes.fromhex(states[name])), dtype=torch.uint8))


def _drawn_from(device: torch.device) -> dict[str, torch.device]:
    """Return the devices whose generators a run draws from, by type."""
    return {"cpu": torch.device("cpu"), device.type: device}
