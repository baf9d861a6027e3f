"""transformers' example run_mlm with a clock: its data, its collator and its Trainer, up to a time instead of a step.

The example is a script that is not part of the package and has no limit in minutes, so the script itself is not run.
Its steps are: tokenize each line with its special tokens, join the tokens of 1,000 lines, cut them into chunks of the
largest length, drop the rest, and give `Trainer` a `datasets.Dataset` and `DataCollatorForLanguageModeling`.
"""

from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import transformers
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bench.end_to_end.learning_curve import Curve
from bertfast.runtime.atomic_write import write_atomically
from bertfast.training.schedule import schedule

CLOCK = "clock.json"  # in a checkpoint: seconds of the steps up to it
DEFAULT_BATCH = TrainingArguments.per_device_train_batch_size


def require_datasets() -> None:
    """End the program if what the Trainer and its data need is not installed."""
    missing = [name for name in ("accelerate", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(f"run_mlm needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def prepare_chunks(
    files: Mapping[str, Sequence[Path]], tokenizer: PreTrainedTokenizerBase, length: int, folder: Path
) -> Any:
    """Return the chunks of each split as a `datasets.DatasetDict`, which is kept in a folder.

    Args:
        files: Text files of each split.
        tokenizer: The tokenizer.
        length: Tokens of a chunk.
        folder: Where the chunks are, or will be.
    """
    from datasets import load_dataset, load_from_disk

    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            names = {split: [str(file) for file in of_split] for split, of_split in files.items()}
            texts = load_dataset("text", data_files=names, cache_dir=scratch)
            tokens = texts.map(
                lambda lines: tokenizer(lines["text"], return_special_tokens_mask=True),
                batched=True,
                remove_columns=["text"],
                desc="tokenizing",
            )
            chunks = tokens.map(partial(cut, length=length), batched=True, desc="cutting")
            chunks.save_to_disk(str(Path(scratch, "chunks")))
            Path(scratch, "chunks").rename(folder)
    return load_from_disk(str(folder))


def cut(columns: Mapping[str, list[list[int]]], length: int) -> dict[str, list[list[int]]]:
    """Join the tokens of lines, and cut them into chunks of `length`; the rest is dropped.

    Args:
        columns: Per column, such as input_ids, a list for each line.
        length: Tokens of a chunk.
    """
    joined = {name: list(chain.from_iterable(lines)) for name, lines in columns.items()}
    whole = len(joined["input_ids"]) // length * length
    return {
        name: [values[start : start + length] for start in range(0, whole, length)] for name, values in joined.items()
    }


class Clock(TrainerCallback):
    """Counts the time of the steps, with that of loading their batches, and ends the training.

    Measuring the curve and writing checkpoints do not count.

    Args:
        curve: The curve of the run.
        tokens_per_step: Tokens of a step.
        seconds: Time of the steps up to the checkpoint from which the run continues.
    """

    def __init__(self, curve: Curve, tokens_per_step: int, seconds: float):
        self.curve, self.tokens_per_step, self.seconds = curve, tokens_per_step, seconds
        self.started: float | None = None  # when the current step began

    @property
    def fraction_done(self) -> float:
        """Fraction of the run that is done, at this moment."""
        current = 0.0 if self.started is None else time.perf_counter() - self.started
        return min((self.seconds + current) / self.curve.limit, 1.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.started is not None
        self.seconds += time.perf_counter() - self.started
        self.started = None
        step, model = state.global_step, kwargs["model"]
        # A checkpoint for each point, so that an interrupted run continues from there.
        control.should_save = self.curve.add_if_due(step, step * self.tokens_per_step, self.seconds, model.state_dict)
        control.should_training_stop = self.seconds >= self.curve.limit
        self.started = time.perf_counter()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        path = Path(args.output_dir, f"checkpoint-{state.global_step}", CLOCK)
        write_atomically(path, json.dumps({"step": state.global_step, "seconds": self.seconds}))
        self.started = time.perf_counter()


class TimedTrainer(Trainer):
    """A trainer whose learning rate rises and falls linearly with the time of a clock, and is 0 at its end.

    Args:
        clock: The clock.
        warmup: Fraction of the run in which the learning rate rises.
        options: Arguments of `Trainer`.
    """

    def __init__(self, clock: Clock, warmup: float, **options: Any):
        self.clock, self.warmup = clock, warmup
        super().__init__(callbacks=[clock], **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        chosen = optimizer or self.optimizer
        assert chosen is not None, "the trainer creates it first"
        self.lr_scheduler = LambdaLR(chosen, lambda step: schedule("linear", self.clock.fraction_done, self.warmup))
        return self.lr_scheduler


def saved_clock(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest whole checkpoint in a folder, None if there is none, and its step and seconds."""
    clocks = {
        path.parent: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"checkpoint-*/{CLOCK}")
    }
    if not clocks:
        return None, {"step": 0, "seconds": 0.0}
    newest = max(clocks, key=lambda path: int(clocks[path]["step"]))
    return newest, clocks[newest]


def train(
    initial: Path,
    chunks: Any,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    curve: Curve,
    *,
    length: int,
    warmup: float,
    **options: Any,
) -> None:
    """Train a model from initial weights until the curve is complete.

    Args:
        initial: Folder of the initial model.
        chunks: Training split of `prepare_chunks`.
        tokenizer: The tokenizer.
        folder: Folder of the checkpoints, from the newest of which the run continues.
        curve: The curve of the run.
        length: Tokens of a chunk.
        warmup: Fraction of the run in which the learning rate rises.
        options: Training arguments that differ from their defaults.
    """
    checkpoint, clock = saved_clock(folder)
    batch = options.get("per_device_train_batch_size", DEFAULT_BATCH)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=10**9,  # the clock ends the training
        use_cpu=True,
        save_strategy="no",  # the clock decides
        save_total_limit=2,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **options,
    )
    trainer = TimedTrainer(
        Clock(curve, batch * length, clock["seconds"]),
        warmup,
        model=transformers.BertForMaskedLM.from_pretrained(initial),
        args=arguments,
        train_dataset=chunks,
        processing_class=tokenizer,
        data_collator=DataCollatorForLanguageModeling(tokenizer),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
