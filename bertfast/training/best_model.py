"""The best model of a fine-tuning run so far, with its predictions, in the run's output folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from bertfast.models.adapters import Adapter
from bertfast.models.files import save
from bertfast.models.tokenizers import copy_tokenizer
from bertfast.tasks.task import Outputs
from bertfast.training.evaluate import write_results
from bertfast.training.finetune_data import RunData
from bertfast.training.report_plots import report_file


@dataclass(frozen=True)
class BestModel:
    """Writes the model of a run whenever it is the best so far.

    Attributes:
        folder: Output folder of the run.
        data: Task, tokenizer and data of the run.
        model: The model that is trained.
        adapter: Its adapter if only that is trained.
        merged: Whether the run ends by merging the adapter into the model.
    """

    folder: Path
    data: RunData
    model: PreTrainedModel
    adapter: Adapter | None
    merged: bool

    def save(self) -> None:
        """Write the model, its tokenizer, and what else its folder holds."""
        # Before the model, which alone opens with another pooling.
        self.data.task.write_folder(self.folder, adapted=self.adapter is not None and not self.merged)
        copy_tokenizer(self.data.tokenizer, self.data.source, self.folder)
        save(self.model, self.folder) if self.adapter is None else self.adapter.save(self.folder)

    def write_predictions(self, split: str, outputs: Outputs) -> None:
        """Write the predictions for a split, and the report of them if the task has one.

        Args:
            split: validation or test.
            outputs: The model's outputs for it.
        """
        task, predicted = self.data.task, (self.data.examples[split], self.data.features[split], outputs)
        task.write_predictions(self.folder, split, *predicted)
        if report := task.report(*predicted):
            write_results(self.folder / report_file(split), report)
