"""The curve of a training run: losses on fixed masked tokens, measured outside of the clock of the run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from bertfast.ops.reference import IGNORE_INDEX
from bertfast.training.metrics_log import Entry, MetricsLog

POINTS = 12  # of a curve

Rows = dict[str, Tensor]
"""Padded inputs of transformers' model, int64 [B, L]: input_ids, attention_mask, token_type_ids and labels."""


class HeldOut:
    """Masked tokens on which the models of all runs are measured alike: by transformers' model, in fp32.

    Args:
        folder: Folder of a model with the sizes of those to be measured.
        sets: Padded batches by the name of the set.
    """

    def __init__(self, folder: Path, sets: Mapping[str, Sequence[Rows]]):
        self.model = transformers.BertForMaskedLM.from_pretrained(folder).eval()
        self.sets = sets

    def described(self) -> dict[str, dict[str, Any]]:
        """Return the sizes of the sets, and a hash that is the same if the tokens and their masks are."""
        return {name: _described(batches) for name, batches in self.sets.items()}

    @torch.no_grad()
    def losses(self, weights: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the mean loss per masked token of each set, in nats.

        Args:
            weights: State of a model for masked LM, or of one that has other heads as well.

        Raises:
            ValueError: A weight is missing.
        """
        missing, _ = self.model.load_state_dict(weights, strict=False)
        if missing:
            raise ValueError(f"the model has no {', '.join(missing)}: it cannot be measured")
        return {name: self._loss(batches) for name, batches in self.sets.items()}

    def _loss(self, batches: Sequence[Rows]) -> float:
        total, masked = 0.0, 0
        for rows in batches:
            inputs = {name: values for name, values in rows.items() if name != "labels"}
            chosen = rows["labels"] != IGNORE_INDEX
            # Logits of the masked tokens alone, [masked, vocabulary].
            logits = self.model.cls(self.model.bert(**inputs).last_hidden_state[chosen])
            total += cross_entropy(logits, rows["labels"][chosen], reduction="sum").item()
            masked += int(chosen.sum())
        return total / masked


def _described(batches: Sequence[Rows]) -> dict[str, Any]:
    digest = hashlib.sha256()
    for rows in batches:
        for name in ("input_ids", "labels"):
            digest.update(rows[name].numpy().tobytes())
    return {
        "sequences": sum(len(rows["labels"]) for rows in batches),
        "tokens": sum(int(rows["attention_mask"].sum()) for rows in batches),
        "masked": sum(int((rows["labels"] != IGNORE_INDEX).sum()) for rows in batches),
        "sha256": digest.hexdigest(),
    }


class Curve:
    """Losses of a run at equal distances in the time of its steps, in a file that an interrupted run continues.

    Args:
        folder: Folder of the file.
        held_out: What the losses are measured on.
        limit: Seconds of the run.
        steps_done: Steps of the checkpoint from which the run continues; points of later steps are dropped.
    """

    def __init__(self, folder: Path, held_out: HeldOut, limit: float, steps_done: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.held_out, self.limit = held_out, limit
        self.log = MetricsLog(folder, steps_done=steps_done)
        self.points: list[Entry] = self.log.entries()

    @property
    def is_complete(self) -> bool:
        """Whether the last point is that of the end of the run."""
        return bool(self.points) and self.points[-1]["seconds"] >= self.limit

    def add_if_due(self, step: int, tokens: int, seconds: float, weights: Callable[[], Mapping[str, Tensor]]) -> bool:
        """Measure the model if its time has come, as after the last step.

        Args:
            step: Steps done.
            tokens: Tokens that the model was trained on, without padding.
            seconds: Time of the steps.
            weights: Returns the state of the model.

        Returns:
            Whether it was measured.
        """
        if seconds < self.limit * min(len(self.points) + 1, POINTS) / POINTS:
            return False
        point = {"step": step, "tokens": tokens, "seconds": seconds, **self.held_out.losses(weights())}
        self.points.append(point)
        self.log.write(**point)
        return True
