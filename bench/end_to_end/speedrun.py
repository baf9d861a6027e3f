"""`base` by the recipe `speedrun` on Wikipedia and books for minutes, beside transformers compiled; then SST-2 from it.

    python -m bench.end_to_end.speedrun --pack DATA ARCHIVE [--files N]
    python -m bench.end_to_end.speedrun ARCHIVE --output FOLDER [--sides bertfast transformers tuned] [--minutes 8]
        [--preset base] [--rate R] [--results FOLDER]

The first makes ARCHIVE (.tar.xz) of DATA, laid out as the tests' data are: token shards of the books and of N files of
Wikipedia with the published vocabulary, and SST-2; it is all that the second needs, on a machine without a network.
What FOLDER holds already is not run again, so that each side can have a call of its own. Theirs is BertForMaskedLM with
PyTorch's attention, compiled, in rows padded to the greatest length, trained by PyTorch's fused AdamW. Minutes are
those of steps on both sides: neither compiling nor validating counts. Both are validated on the same masked tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bench.end_to_end.curve_parity import mean, padded
from bench.end_to_end.long_run import corpus, fill
from bench.harness import RESULTS, write_result
from bertfast.cli.flags import parse
from bertfast.data.prepare import PrepareSettings, prepare
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.plotting import draw
from bertfast.runtime.precision import autocast, wait_for
from bertfast.training.finetune import FinetuneSettings, finetune
from bertfast.training.metrics_log import MetricsLog
from bertfast.training.pretrain import Pretraining, PretrainSettings, pretrain
from bertfast.training.schedule import schedule

RECIPE = Path(__file__).parents[2] / "recipes" / "speedrun.yaml"
VALIDATIONS = 8  # of a run: one a minute where it is of eight
MEANS = ("gemm_efficiency", "waited_for_batches")  # over a run's steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--pack", type=Path, metavar="DATA")
    parser.add_argument("--files", type=int, default=4, help="of Wikipedia")
    parser.add_argument("--output", type=Path, help="keep shards, models and curves here")
    parser.add_argument("--sides", nargs="*", default=["bertfast", "transformers", "tuned"], choices=list(SIDES))
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--rate", type=float, default=5e-4, help="their learning rate")
    parser.add_argument("--tokens", type=int, default=65_536, help="of a step")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
    if arguments.pack:
        pack(arguments.pack, arguments.archive, arguments.files)
        return
    if arguments.output is None:
        parser.error("--output says where the runs are kept")
    keep_freed_memory()  # or theirs would pay page faults on a CPU
    arguments.output.mkdir(parents=True, exist_ok=True)
    if not (arguments.output / "sst-2").exists():  # which is unpacked last
        with tarfile.open(arguments.archive) as archive:
            archive.extractall(arguments.output, filter="data")
    found = {}
    for side, run in SIDES.items():
        file = arguments.output / f"{side}.json"
        if side in arguments.sides and not file.exists():
            file.write_text(json.dumps(run(arguments)), encoding="utf-8")
        if file.exists():
            found[side] = json.loads(file.read_text(encoding="utf-8"))
    result = {"minutes": arguments.minutes, "preset": arguments.preset, "tokens_of_a_step": arguments.tokens, **found}
    path = write_result("speedrun", result, arguments.results)
    plot(
        {side: found[side]["validations"] for side in ("bertfast", "transformers") if side in found},
        path.with_suffix(".png"),
    )
    for side, values in found.items():
        print(side, values.get("metrics") or values["validations"][-1])
    print(f"written to {path}")


def pack(data: Path, archive: Path, files: int) -> None:
    """Shards and SST-2 in one file."""
    settings = corpus(data / "corpus")
    books, encyclopedia = (
        [name for name in settings.train_file if ("books" in name) == of_books] for of_books in (1, 0)
    )
    with TemporaryDirectory() as scratch, tarfile.open(archive, "w:xz") as target:
        vocabulary = str(data / "vocab" / "bert-base-uncased-vocab.txt")
        train = [*books, *encyclopedia[:files]]
        chosen = settings.replace(train_file=train, tokenizer_name=vocabulary, vocab_size=30_522)
        target.add(prepare(PrepareSettings(scratch, chosen)), "shards")
        target.add(data / "glue" / "SST-2", "sst-2")
    print(f"{archive.stat().st_size / 2**20:.1f} MiB")


def settings_for(arguments: argparse.Namespace, **changes) -> PretrainSettings:
    """Of the recipe, with the archive's shards; validated after each of as many steps as `changes` say."""
    flags = {
        "data-dir": arguments.output / "shards",
        "preset": arguments.preset,
        "minutes": arguments.minutes,
        "tokens-per-batch": arguments.tokens,
        "eval-batches": 8,
        "save-steps": 10**6,
        **changes,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return parse("pretrain", PretrainSettings, ["--config", str(RECIPE), *words])


def ours(arguments: argparse.Namespace) -> dict:
    """`bertfast pretrain`."""
    folder = arguments.output / "bertfast"
    every = max(round(60 * arguments.minutes / VALIDATIONS / seconds_of_a_step(arguments)), 1)
    settings = settings_for(arguments, **{"output-dir": folder, "eval-steps": every})
    pretrain(settings.replace(resume=True))  # a run that ended, but was not written down, is only read
    entries = MetricsLog(folder, steps_done=sys.maxsize).entries()
    steps = [entry for entry in entries if "masked_lm_loss" in entry]
    validations = [entry for entry in entries if "validation_loss" in entry]
    seconds = validations[-1]["seconds"]
    return {
        "steps": validations[-1]["step"],
        "tokens": validations[-1]["step"] * arguments.tokens,
        "tokens_per_second": validations[-1]["step"] * arguments.tokens / seconds,
        **{name: mean(step[name] for step in steps) for name in MEANS if steps},
        "validations": validations,
        "blanks": fill(folder),
    }


def seconds_of_a_step(arguments: argparse.Namespace) -> float:
    """Of the later ones of twenty: in the first, kernels are compiled and the step is recorded."""
    with TemporaryDirectory() as folder:
        settings = settings_for(arguments, **{"output-dir": folder, "logging-steps": 10})
        pretrain(settings.replace(minutes=None, max_steps=20))
        entries = MetricsLog(Path(folder), steps_done=sys.maxsize).entries()
        return arguments.tokens / [e["tokens_per_second"] for e in entries if "tokens_per_second" in e][-1]


def theirs(arguments: argparse.Namespace) -> dict:
    """A loop as one would write it around transformers' model, on the same texts in rows of one length."""
    with TemporaryDirectory() as scratch:
        run = Pretraining(settings_for(arguments, **{"output-dir": scratch}))  # for its batches and precision
    settings, device, longest = run.settings, run.device, run.settings.sampling.max_seq_length
    values = run.model.config.to_dict()
    torch.manual_seed(settings.seed)
    model = transformers.BertForMaskedLM(transformers.BertConfig(**values, attn_implementation="sdpa")).to(device)
    compiled = torch.compile(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=settings.optimizer.weight_decay, fused=True)
    source = rows_of_steps(run, arguments.tokens // longest, longest)
    limit, seconds, waited, tokens, validations = 60 * settings.duration.minutes, 0.0, 0.0, 0, []

    def step(rows: dict[str, Tensor], rate: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = rate
        with autocast(device, run.precision):
            loss = compiled(**{name: x.to(device, non_blocking=True) for name, x in rows.items()}).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    with ThreadPoolExecutor(1) as ahead, tqdm(total=limit, desc="transformers", unit="s") as bar:
        step(next(source), 0.0)  # compiles, and learns nothing
        rows = ahead.submit(next, source)
        wait_for(device)
        for number in count(1):
            started = time.perf_counter()
            now, rows = rows.result(), ahead.submit(next, source)
            waited += time.perf_counter() - started
            step(now, arguments.rate * schedule("linear", seconds / limit, settings.optimizer.warmup_ratio))
            tokens += int(now["attention_mask"].sum())
            spent = time.perf_counter() - started
            due = seconds + spent >= limit * min(len(validations) + 1, VALIDATIONS) / VALIDATIONS
            if due:  # otherwise steps are given to the device while it works, as in ours
                wait_for(device)
                spent = time.perf_counter() - started
            seconds += spent
            bar.update(spent)
            if due:
                loss = validation_loss(model, run, longest)
                validations.append({"step": number, "seconds": seconds, "validation_loss": loss})
            if seconds >= limit:
                break
    return {
        "learning_rate": arguments.rate,
        "steps": number,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
        "waited_for_batches": waited / seconds,
        "validations": validations,
    }


def rows_of_steps(run: Pretraining, rows: int, longest: int) -> Iterator[dict[str, Tensor]]:
    """The samples of ours in their order, `rows` of one length at a time: shapes that a compiler sees once."""
    held, pin = {}, run.device.type == "cuda"  # pinned, so that copies to the device wait for nothing
    while True:
        for name, values in as_rows(run.loader.next(), longest).items():
            held[name] = torch.cat([held[name], values]) if name in held else values
        while len(held["input_ids"]) >= rows:
            first = {name: values[:rows] for name, values in held.items()}
            yield {name: values.pin_memory() for name, values in first.items()} if pin else first
            held = {name: values[rows:] for name, values in held.items()}


def as_rows(batch, longest: int) -> dict[str, Tensor]:
    """A packed batch as rows [S, longest]."""
    rows = padded(batch)
    filled = {
        name: values.new_full((len(values), longest), IGNORE_INDEX * (name == "labels"))
        for name, values in rows.items()
    }
    for name, values in rows.items():
        filled[name][:, : values.shape[1]] = values
    return filled


@torch.no_grad()
def validation_loss(model: torch.nn.Module, run: Pretraining, longest: int) -> float:
    """Mean loss of the masked tokens that ours is validated on."""
    model.eval()
    total, masked = 0.0, 0
    for batch in run.plan.held_out:
        rows = as_rows(batch, longest)
        for part in zip(*(values.split(64) for values in rows.values()), strict=True):
            inputs = dict(zip(rows, (x.to(run.device) for x in part), strict=True))
            counted = int((inputs["labels"] != IGNORE_INDEX).sum())
            with autocast(run.device, run.precision):
                total += model(**inputs).loss.item() * counted if counted else 0.0
            masked += counted
    model.train()
    return total / masked


def tuned(arguments: argparse.Namespace) -> dict:
    """SST-2 from ours."""
    where = {split: str(arguments.output / "sst-2" / f"{split}.tsv.gz") for split in ("train", "dev")}
    results = finetune(
        FinetuneSettings.of(
            model_name_or_path=str(arguments.output / "bertfast"),
            task="sst-2",
            train_file=where["train"],
            validation_file=where["dev"],
            output_dir=str(arguments.output / "tuned"),
            overwrite_output_dir=True,
            num_train_epochs=2,
            max_seq_length=128,
        )
    )
    return {"metrics": results}


SIDES = {"bertfast": ours, "transformers": theirs, "tuned": tuned}


def plot(curves: dict[str, list[dict]], path: Path) -> None:
    """Validation losses by the minute."""

    def paint(axes) -> None:
        names = {"bertfast": "bertfast", "transformers": "transformers, compiled"}
        for side, validations in curves.items():
            minutes = [one["seconds"] / 60 for one in validations]
            axes.plot(minutes, [one["validation_loss"] for one in validations], marker=".", label=names[side])
        axes.set(xlabel="minutes of steps", ylabel="validation loss, nats a masked token")
        axes.legend()
        axes.grid(alpha=0.3)

    draw(path, (8, 4.5), paint)


if __name__ == "__main__":
    main()
