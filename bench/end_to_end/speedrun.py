"""Pre-train `base` for minutes by the recipe `speedrun`, compared with compiled transformers; then fine-tune on SST-2.

    python -m bench.end_to_end.speedrun --pack DATA ARCHIVE [--files N]
    python -m bench.end_to_end.speedrun ARCHIVE --output FOLDER [--sides bertfast transformers finetuned] [--minutes 8]
        [--preset base] [--rate R] [--results FOLDER]

The first command packs token shards of the books and of N files of Wikipedia, with the published vocabulary, and SST-2
into ARCHIVE (.tar.xz), which is all that the second command needs on a machine without a network. Runs that are already
in FOLDER are not repeated, so each side can be run by a separate call. The side "transformers" is BertForMaskedLM with
PyTorch's attention, compiled, on rows padded to the largest length, trained by PyTorch's fused AdamW. Only the time of
steps counts, not that of compilation and validation. Both sides are validated on the same masked tokens.
"""

from __future__ import annotations

import argparse
import json
import tarfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bench.arguments import result_parser
from bench.end_to_end.curve_parity import mean, padded
from bench.end_to_end.long_run import corpus, fill, logged
from bench.figures import STEP_COLORS
from bench.harness import hf_config
from bench.result_files import ROOT, require_clean_tree, write_result
from bertfast.cli.flags import parse
from bertfast.data.batches import Batch
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.plotting import draw
from bertfast.runtime.precision import autocast, wait_for
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.pretraining import Pretraining, PretrainSettings, pretrain
from bertfast.training.schedule import schedule

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RECIPE = ROOT / "recipes" / "speedrun.yaml"
VALIDATIONS = 8  # per run
MEANS = ("gemm_efficiency", "waited_for_batches")  # over the steps of a run


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("archive", type=Path, help=".tar.xz file with shards and SST-2")
    parser.add_argument("--pack", type=Path, metavar="DATA", help="only write the archive, from this folder")
    parser.add_argument("--files", type=int, default=4, help="number of files of Wikipedia to pack")
    parser.add_argument("--output", type=Path, help="folder to keep shards, models and curves")
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=list(SIDES), help="what to run")
    parser.add_argument("--minutes", type=float, default=8, help="duration of the steps of a side")
    parser.add_argument("--preset", default="base", help="size of the model")
    parser.add_argument("--rate", type=float, default=5e-4, help="peak learning rate of transformers")
    parser.add_argument("--tokens", type=int, default=65_536, help="tokens per step")
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.pack, arguments.archive, arguments.files)
        return
    if arguments.output is None:
        parser.error("--output is required without --pack")
    require_clean_tree(arguments.results)
    keep_freed_memory()  # so that transformers, too, pays for no page faults on a CPU
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not (arguments.output / "sst-2").exists():  # unpacked last
        with tarfile.open(arguments.archive) as archive:
            archive.extractall(arguments.output, filter="data")
    found = {}
    for side, run in SIDES.items():
        file = arguments.output / f"{side}.json"
        if side in arguments.sides and not file.exists():
            file.write_text(json.dumps(run(arguments)), encoding="utf-8")
        if file.exists():
            found[side] = json.loads(file.read_text(encoding="utf-8"))
    result = {"minutes": arguments.minutes, "preset": arguments.preset, "tokens_per_step": arguments.tokens, **found}
    path = write_result("speedrun", result, arguments.results)
    curves = {side: values["validations"] for side, values in found.items() if "validations" in values}
    plot(curves, arguments.preset, path.with_suffix(".png"))
    for side, values in found.items():
        print(side, values.get("metrics") or values["validations"][-1])
    print(f"written to {path}")


def pack(data: Path, archive: Path, files: int) -> None:
    """Write shards and SST-2 to one file."""
    settings = corpus(data / "corpus")
    books = [name for name in settings.train_file if "books" in name]
    wikipedia = [name for name in settings.train_file if "books" not in name]
    with TemporaryDirectory() as scratch, tarfile.open(archive, "w:xz") as target:
        vocabulary = str(data / "vocab" / "bert-base-uncased-vocab.txt")
        train = [*books, *wikipedia[:files]]
        chosen = CorpusSettings(train, settings.validation_file, tokenizer_name=vocabulary)
        target.add(prepare(PrepareSettings(scratch, chosen)), "shards")
        target.add(data / "glue" / "SST-2", "sst-2")
    print(f"{archive.stat().st_size / 2**20:.1f} MiB")


def settings_for(arguments: argparse.Namespace, **changes: object) -> PretrainSettings:
    """Return the settings of the recipe on the shards of the archive, with other flags changed."""
    flags = {
        "data-dir": arguments.output / "shards",
        "preset": arguments.preset,
        "minutes": arguments.minutes,
        "tokens-per-batch": arguments.tokens,
        "eval-batches": 8,
        "save-steps": 10**6,
        **changes,
    }
    command = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return parse("pretrain", PretrainSettings, ["--config", str(RECIPE), *command])


def train_bertfast(arguments: argparse.Namespace) -> dict[str, object]:
    """Run `bertfast pretrain`."""
    folder = arguments.output / "bertfast"
    every = max(round(60 * arguments.minutes / VALIDATIONS / seconds_per_step(arguments)), 1)
    settings = settings_for(arguments, **{"output-dir": folder, "eval-steps": every})
    pretrain(settings.replace(resume=True))  # a finished run without a result file is only read
    steps, validations = logged(folder)
    seconds = validations[-1]["seconds"]
    return {
        "steps": validations[-1]["step"],
        "tokens": validations[-1]["step"] * arguments.tokens,
        "tokens_per_second": validations[-1]["step"] * arguments.tokens / seconds,
        **{name: mean(step[name] for step in steps) for name in MEANS if steps},
        "validations": validations,
        "fill_mask": fill(folder),
    }


def seconds_per_step(arguments: argparse.Namespace) -> float:
    """Return the seconds per step of the last ten of twenty steps; the first compile kernels and capture a graph."""
    with TemporaryDirectory() as folder:
        settings = settings_for(arguments, **{"output-dir": folder, "logging-steps": 10})
        pretrain(settings.replace(minutes=None, max_steps=20))
        steps, _ = logged(Path(folder))
        throughputs = [entry["tokens_per_second"] for entry in steps if "tokens_per_second" in entry]
        return float(arguments.tokens / throughputs[-1])


class PlainLoop:
    """A plain training loop around transformers' compiled model, on the samples of a run of bertfast.

    Args:
        run: Gives samples, settings, precision and validation batches.
        rows: Samples per step.
        learning_rate: Peak learning rate.
    """

    def __init__(self, run: Pretraining, rows: int, learning_rate: float):
        self.run, self.device, self.learning_rate = run, run.device, learning_rate
        self.max_seqlen = run.settings.sampling.max_seq_length
        hyperparameters = run.settings.optimizer
        torch.manual_seed(run.settings.seed)
        model = transformers.BertForMaskedLM(hf_config(run.model.config))
        self.model: transformers.BertForMaskedLM = model.train().to(self.device)
        self.compiled: Callable[..., Any] = torch.compile(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=0.0, weight_decay=hyperparameters.weight_decay, fused=True
        )
        self.warmup_ratio, self.max_grad_norm = hyperparameters.warmup_ratio, hyperparameters.max_grad_norm
        self.batches = batches_of_rows(run, rows, self.max_seqlen)

    def step(self, rows: dict[str, Tensor], learning_rate: float) -> None:
        """Train on a batch; on a GPU this returns before the device has finished."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        with autocast(self.device, self.run.precision):
            loss = self.compiled(**{name: x.to(self.device, non_blocking=True) for name, x in rows.items()}).loss
        loss.backward()
        clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, limit: float) -> dict[str, object]:
        """Train for `limit` seconds of steps, with batches assembled in advance; return the entries of a side."""
        seconds, waited, tokens = 0.0, 0.0, 0
        validations: list[dict[str, float]] = []
        with ThreadPoolExecutor(1) as ahead, tqdm(total=limit, desc="transformers", unit="s") as bar:
            self.step(next(self.batches), 0.0)  # compiles, without training
            pending = ahead.submit(next, self.batches)
            wait_for(self.device)
            for number in count(1):
                started = time.perf_counter()
                rows, pending = pending.result(), ahead.submit(next, self.batches)
                waited += time.perf_counter() - started
                self.step(rows, self.learning_rate * schedule("linear", seconds / limit, self.warmup_ratio))
                tokens += int(rows["attention_mask"].sum())
                spent = time.perf_counter() - started
                due = seconds + spent >= limit * min(len(validations) + 1, VALIDATIONS) / VALIDATIONS
                if due:  # other steps are queued while the device works, as in bertfast
                    wait_for(self.device)
                    spent = time.perf_counter() - started
                seconds += spent
                bar.update(spent)
                if due:
                    loss = self.validation_loss()
                    validations.append({"step": number, "seconds": seconds, "validation_loss": loss})
                if seconds >= limit:
                    break
        return {
            "learning_rate": self.learning_rate,
            "steps": number,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "waited_for_batches": waited / seconds,
            "validations": validations,
        }

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the mean loss of the masked tokens on which bertfast is validated."""
        self.model.eval()
        total, masked = 0.0, 0
        for batch in self.run.plan.held_out:
            rows = as_rows(batch, self.max_seqlen)
            for part in zip(*(values.split(64) for values in rows.values()), strict=True):
                inputs = dict(zip(rows, (x.to(self.device) for x in part), strict=True))
                counted = int((inputs["labels"] != IGNORE_INDEX).sum())
                with autocast(self.device, self.run.precision):
                    total += self.model(**inputs).loss.item() * counted if counted else 0.0
                masked += counted
        self.model.train()
        return total / masked


def train_transformers(arguments: argparse.Namespace) -> dict[str, object]:
    """Train transformers' compiled model in a plain loop, on the same texts."""
    with TemporaryDirectory() as scratch:
        run = Pretraining(settings_for(arguments, **{"output-dir": scratch}))
    rows = arguments.tokens // run.settings.sampling.max_seq_length
    return PlainLoop(run, rows, arguments.rate).train(60 * arguments.minutes)


def batches_of_rows(run: Pretraining, rows: int, max_seqlen: int) -> Iterator[dict[str, Tensor]]:
    """Yield the samples of the run in their order, `rows` at a time, in one shape, so that the model compiles once."""
    held: dict[str, Tensor] = {}
    pin = run.device.type == "cuda"  # pinned memory makes copies to the device asynchronous
    while True:
        for name, values in as_rows(run.loader.next(), max_seqlen).items():
            held[name] = torch.cat([held[name], values]) if name in held else values
        while len(held["input_ids"]) >= rows:
            first = {name: values[:rows] for name, values in held.items()}
            yield {name: values.pin_memory() for name, values in first.items()} if pin else first
            held = {name: values[rows:] for name, values in held.items()}


def as_rows(batch: Batch, max_seqlen: int) -> dict[str, Tensor]:
    """Return a packed batch as padded inputs [sequences, max_seqlen]."""
    rows = padded(batch)
    filled = {
        name: values.new_full((len(values), max_seqlen), IGNORE_INDEX * (name == "labels"))
        for name, values in rows.items()
    }
    for name, values in rows.items():
        filled[name][:, : values.shape[1]] = values
    return filled


def finetuned(arguments: argparse.Namespace) -> dict[str, object]:
    """Fine-tune bertfast's model on SST-2."""
    where = {split: str(arguments.output / "sst-2" / f"{split}.tsv.gz") for split in ("train", "dev")}
    results = finetune(
        FinetuneSettings.of(
            model_name_or_path=str(arguments.output / "bertfast"),
            task="sst-2",
            train_file=where["train"],
            validation_file=where["dev"],
            output_dir=str(arguments.output / "finetuned"),
            overwrite_output_dir=True,
            num_train_epochs=2,
            max_seq_length=128,
        )
    )
    return {"metrics": results}


SIDES = {"bertfast": train_bertfast, "transformers": train_transformers, "finetuned": finetuned}


def plot(curves: dict[str, list[dict[str, Any]]], preset: str, path: Path) -> None:
    """Draw the validation loss over the time of steps."""

    def paint(axes: Axes) -> None:
        names = {"bertfast": "bertfast", "transformers": "transformers, compiled"}
        for side, validations in curves.items():
            minutes = [entry["seconds"] / 60 for entry in validations]
            losses = [entry["validation_loss"] for entry in validations]
            axes.plot(minutes, losses, marker=".", label=names[side], color=STEP_COLORS[names[side]])
        axes.set_title(f"Pre-training BERT-{preset} on Wikipedia and books")
        axes.set(xlabel="time of steps (min)", ylabel="validation loss (nats per masked token)")
        axes.legend()
        axes.grid(alpha=0.3)

    draw(path, (8, 4.5), paint)


if __name__ == "__main__":
    main()
