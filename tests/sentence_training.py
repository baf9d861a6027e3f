"""Training of embeddings and rerankers, and the losses of a plain loop around a loss of sentence-transformers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sentiment import QUICK
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from bertfast.training.finetuning import FinetuneSettings, Finetuning
from bertfast.training.schedule import schedule

STEPS, BATCH = 50, 6


def settings_for(task: str, model: Path, file: Path, out: Path, **changes) -> FinetuneSettings:
    values = {"dropout": 0.0, "logging_steps": 1, "num_train_epochs": 3.0} | QUICK | changes
    where = {"model_name_or_path": str(model), "train_file": str(file), "output_dir": str(out), "task": task}
    return FinetuneSettings.of(**where | values)


def losses_of_loop(run: Finetuning, model: nn.Module, loss_of: Callable[[np.ndarray], Tensor]) -> list[float]:
    """Train a model on the steps of a run, with its optimizer and schedule; return the losses of the steps.

    Args:
        run: The run.
        model: Model of sentence-transformers with the same weights, in training mode.
        loss_of: Returns the loss of the examples at these indices.
    """
    settings, losses = run.settings, []
    decays, others = ([p for p in model.parameters() if (p.dim() > 1) == decay] for decay in (True, False))
    groups = [{"params": decays, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    for step, rows in zip(range(run.steps), run.rows_of_steps(), strict=False):
        loss = loss_of(rows)
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = settings.hyperparameters.learning_rate * schedule("linear", step / run.steps, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
