"""Compare what `bertfast pretrain` and transformers' run_mlm with Trainer learn in a given time on a CPU.

    python -m bench.end_to_end.learning_per_minute DATA RUN … --output FOLDER [--minutes M] [--seeds N …]

DATA contains corpus/wikipedia-*.txt.xz and corpus/books-*.txt.xz. All runs of a text start from the same random weights
of `mini`, with a vocabulary of 8,192 trained on it, and have at most 128 tokens per sequence. Text is tokenized before.
Learning rates fall to 0 at the end of the time, which is that of the steps, including their batches. At twelve times,
outside of that time, transformers' model in fp32 gets the weights, and its loss is measured on two fixed sets of masked
tokens of the validation text: "sentences", samples as bertfast cuts them, and "chunks", as run_mlm does.

RUN are names of RECIPES in this file, or --name with --flags. Each writes a result file when it ends; runs that have
one are not repeated, and an interrupted run continues from its last checkpoint. Recipes are chosen with --text books.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, DataCollatorForLanguageModeling, PreTrainedTokenizerBase

from bench.arguments import add_names, at_least_one, result_parser
from bench.end_to_end import run_mlm
from bench.end_to_end.curve_parity import initial_model, padded
from bench.end_to_end.learning_curve import Curve, HeldOut, Rows
from bench.result_files import require_clean_tree, write_result
from bertfast.cli.flags import parse
from bertfast.data.batches import Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.special_tokens import special_tokens
from bertfast.data.tokenizer import continuation_tokens
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.runtime.precision import has_bf16_gemm
from bertfast.training.pretrain_data import Corpus
from bertfast.training.pretraining import Pretraining, PretrainSettings

VOCAB_SIZE, LENGTH = 8192, 128
TOKENS, SEQUENCES = 2048, 512  # tokens of a batch, and sequences of "chunks", of which "sentences" has as many tokens
PRECISIONS = ("bf16", "fp32")


@dataclass(frozen=True)
class Recipe:
    """How a side trains.

    Attributes:
        minutes: Duration of the steps, unless --minutes is given.
        flags: Of bertfast, the flags of `bertfast pretrain`; None: transformers.
        options: Of transformers, the training arguments that differ from their defaults.
        warmup: Of transformers, the fraction of the run in which the learning rate rises.
        precision: None: bf16 if the processor has instructions for it.
    """

    minutes: float
    flags: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    warmup: float = 0.0
    precision: str | None = None

    @property
    def side(self) -> str:
        return "transformers" if self.flags is None else "bertfast"


RATES = (5e-4, 1e-3, 2e-3)
MUON = "--optimizer muon --adam-beta2 0.98 --warmup-ratio 0.05 --dropout 0"
# The same recipe on both sides: 2,048 tokens per step, AdamW with a weight decay of 0.01, dropout 0.1, 15 % masked.
SAME = {
    f"transformers-adamw-{rate:g}": Recipe(
        60, None, {"learning_rate": rate, "weight_decay": 0.01, "per_device_train_batch_size": TOKENS // LENGTH}, 0.05
    )
    for rate in RATES
} | {
    f"bertfast-adamw-{rate:g}": Recipe(30, f"--learning-rate {rate:g} --warmup-ratio 0.05 --dropout 0.1")
    for rate in RATES
}
RECIPES = {
    **SAME,
    "transformers-defaults": Recipe(60, precision="fp32"),
    "transformers-defaults-bf16": Recipe(60),
    # Candidates for bertfast's best recipe: each differs from "bertfast-muon" in one respect.
    "bertfast-muon": Recipe(20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.2"),
    "bertfast-muon-wsd": Recipe(20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.2 --schedule wsd"),
    "bertfast-muon-0.0015": Recipe(20, f"{MUON} --learning-rate 0.0015 --mlm-probability 0.2"),
    "bertfast-muon-0.006": Recipe(20, f"{MUON} --learning-rate 0.006 --mlm-probability 0.2"),
    "bertfast-muon-15-percent": Recipe(20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.15"),
    "bertfast-muon-30-percent": Recipe(20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.3"),
    "bertfast-muon-1024-tokens": Recipe(
        20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.2 --tokens-per-batch 1024"
    ),
    "bertfast-muon-4096-tokens": Recipe(
        20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.2 --tokens-per-batch 4096"
    ),
    "bertfast-muon-8192-tokens": Recipe(
        20, f"{MUON} --learning-rate 0.003 --mlm-probability 0.2 --tokens-per-batch 8192"
    ),
    "bertfast-adamw-no-dropout": Recipe(
        20, "--learning-rate 0.002 --adam-beta2 0.98 --warmup-ratio 0.05 --dropout 0 --mlm-probability 0.2"
    ),
}
CHOSEN = "bertfast-muon-8192-tokens"  # the best that ran with --text books; recipes/cpu.yaml has the same settings


def main() -> None:
    arguments = parse_arguments()
    if any(recipe.side == "transformers" for recipe in arguments.recipes.values()):
        run_mlm.require_datasets()
    require_clean_tree(arguments.results)
    keep_freed_memory()  # on both sides
    for seed in arguments.seeds:
        for name, recipe in arguments.recipes.items():
            title = title_of(name, recipe, seed, arguments.text)
            if (arguments.results / f"{title}.json").exists():
                print(f"{title}: there is a result, so it is not repeated", flush=True)
                continue
            result = result_of(title, recipe, seed, arguments)
            path = write_result(title, {"recipe": name, **result}, arguments.results)
            end = result["curve"][-1]
            losses = ", ".join(f"{end[text]:.4f} on {text}" for text in result["validation"])
            print(f"{title}: {losses}; {result['tokens_per_second']:.0f} tokens/s; written to {path}", flush=True)


def parse_arguments() -> argparse.Namespace:
    """Return the arguments, with `recipes`, the recipe of each run by its name."""
    parser = result_parser(__doc__)
    parser.add_argument("data", type=Path, help="folder with the texts")
    add_names(parser, "runs", "run", RECIPES)
    parser.add_argument("--output", type=Path, required=True, help="folder for texts, checkpoints and curves")
    parser.add_argument("--text", choices=("wikipedia", "books"), default="wikipedia", help="what is learned")
    parser.add_argument("--minutes", type=float, help="duration of the steps (default: that of the recipe)")
    parser.add_argument("--seeds", type=at_least_one, nargs="+", default=[1], help="seeds of weights and samples")
    parser.add_argument("--preset", default="mini", help="size of the model")
    parser.add_argument("--precision", choices=PRECISIONS, help="precision of all runs (default: that of the recipe)")
    parser.add_argument("--name", help="name of a further run of bertfast, with the flags of --flags")
    parser.add_argument("--flags", help="flags of `bertfast pretrain`, as in --flags='--optimizer muon'")
    arguments = parser.parse_intermixed_args()  # RUN may follow an option, which parse_args refuses before Python 3.13
    if (arguments.name is None) != (arguments.flags is None):
        parser.error("--name and --flags go together: give both, or neither")
    recipes = {name: RECIPES[name] for name in arguments.runs}
    if arguments.name is not None:
        recipes[f"bertfast-{arguments.name}"] = Recipe(20, arguments.flags)
    if not recipes:
        parser.error(f"nothing to run: name one of {', '.join(RECIPES)}, or give --name and --flags")
    best = "bf16" if has_bf16_gemm(torch.device("cpu")) else "fp32"
    arguments.recipes = {
        name: replace(
            recipe,
            minutes=recipe.minutes if arguments.minutes is None else arguments.minutes,
            precision=arguments.precision or recipe.precision or best,
        )
        for name, recipe in recipes.items()
    }
    return arguments


def title_of(name: str, recipe: Recipe, seed: int, text: str) -> str:
    """Return the name of the result file of a run, without its suffix."""
    return f"learning_per_minute-{text}-{name}-{recipe.minutes:g}-minutes-seed-{seed}"


def result_of(title: str, recipe: Recipe, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train by a recipe; return the entries of its result file."""
    folder: Path = arguments.output / arguments.text
    shards = prepare(PrepareSettings(str(folder / "data"), corpus(arguments.data / "corpus", arguments.text)))
    initial = folder / f"initial-{arguments.preset}-{seed}"
    if not (initial / "tokenizer.json").exists():  # written last
        initial_model(initial, shards, arguments.preset, seed)
    tokenizer = AutoTokenizer.from_pretrained(initial)
    chunks = chunks_of(arguments, tokenizer, folder)
    held_out = HeldOut(initial, {"sentences": sentences(shards), "chunks": masked(chunks["validation"], tokenizer)})
    train = train_transformers if recipe.side == "transformers" else train_bertfast
    curve = train(recipe, Run(folder / title, seed, shards, initial, tokenizer, chunks["train"], held_out))
    end = curve.points[-1]
    return {
        "side": recipe.side,
        "text": arguments.text,
        "flags": recipe.flags,
        "options": recipe.options,
        "warmup_ratio": recipe.warmup if recipe.side == "transformers" else None,
        "minutes": recipe.minutes,
        "seed": seed,
        "preset": arguments.preset,
        "precision": recipe.precision,
        "max_seq_length": LENGTH,
        "validation": held_out.described(),
        "steps": end["step"],
        "tokens": end["tokens"],
        "tokens_per_second": end["tokens"] / end["seconds"],
        "curve": curve.points,
    }


def corpus(folder: Path, text: str) -> CorpusSettings:
    """Return the settings of a text, with its own vocabulary."""
    files = {split: [str(path) for path in files_of(folder, text, split)] for split in ("train", "valid")}
    return CorpusSettings(files["train"], files["valid"], vocab_size=VOCAB_SIZE)


def files_of(folder: Path, text: str, split: str) -> list[Path]:
    """Return the files of a text; SystemExit if there are none."""
    files = sorted(folder.glob(f"{text}-{split}*.txt.xz"))
    if not files:
        raise SystemExit(f"{folder} has no {text}-{split}*.txt.xz: name a folder that has, or choose another --text")
    return files


def chunks_of(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, folder: Path) -> Any:
    """Return run_mlm's chunks of both splits."""
    splits = {"train": "train", "validation": "valid"}
    where = arguments.data / "corpus"
    files = {name: files_of(where, arguments.text, split) for name, split in splits.items()}
    return run_mlm.prepare_chunks(files, tokenizer, LENGTH, folder / "chunks")


def sentences(shards: Path) -> list[Rows]:
    """Return masked samples of the validation text as bertfast cuts them: runs of whole sentences."""
    text = Corpus.of(shards)
    batches = Batches(
        text.validation,
        special_tokens(text.tokenizer),
        continuation_tokens(text.tokenizer, whole_word=False),
        Sampling(max_seq_length=LENGTH, objective="mlm"),
        tokens_per_bin=TOKENS,
        bins_per_step=1,
        seed=0,
    )
    return [padded(batch) for batch in batches.first_epoch(SEQUENCES * LENGTH // TOKENS)]


def masked(chunks: Any, tokenizer: PreTrainedTokenizerBase) -> list[Rows]:
    """Return masked chunks of the validation text, by transformers' collator."""
    order = np.random.default_rng(0).permutation(len(chunks))[:SEQUENCES]
    collate = DataCollatorForLanguageModeling(tokenizer, seed=0)
    rows = [chunks[int(index)] for index in order]
    return [dict(collate(rows[start : start + 16])) for start in range(0, len(rows), 16)]


@dataclass(frozen=True)
class Run:
    """What a side trains on.

    Attributes:
        folder: Folder for checkpoints and the curve.
        seed: Seed of samples, masks and dropout.
        shards: Folder of the text for bertfast.
        initial: Folder of the initial model.
        tokenizer: Its tokenizer.
        chunks: The text for transformers.
        held_out: What the curve is measured on.
    """

    folder: Path
    seed: int
    shards: Path
    initial: Path
    tokenizer: PreTrainedTokenizerBase
    chunks: Any
    held_out: HeldOut

    def curve(self, recipe: Recipe, steps_done: int) -> Curve:
        """Return the curve up to the checkpoint of a step."""
        return Curve(self.folder / "curve", self.held_out, 60 * recipe.minutes, steps_done)


def train_transformers(recipe: Recipe, run: Run) -> Curve:
    """Train with `Trainer`; return the curve."""
    curve = run.curve(recipe, run_mlm.saved_clock(run.folder)[1]["step"])
    if not curve.is_complete:
        run_mlm.train(
            run.initial,
            run.chunks,
            run.tokenizer,
            run.folder,
            curve,
            length=LENGTH,
            warmup=recipe.warmup,
            seed=run.seed,
            bf16=recipe.precision == "bf16",
            **recipe.options,
        )
    return curve


def train_bertfast(recipe: Recipe, run: Run) -> Curve:
    """Run `bertfast pretrain`; return the curve."""
    training = Pretraining(pretrain_settings(recipe, run))
    curve = run.curve(recipe, training.step)
    if not curve.is_complete:
        training.run(measuring(training, curve))
    return curve


def pretrain_settings(recipe: Recipe, run: Run) -> PretrainSettings:
    """Return the settings of bertfast's side."""
    assert recipe.flags is not None
    fixed = f"""--objective mlm --max-seq-length {LENGTH} --tokens-per-batch {TOKENS} --minutes {recipe.minutes}
        --seed {run.seed} --precision {recipe.precision} --device cpu --eval-steps {10**9} --eval-batches 1 --resume"""
    folders = ["--output-dir", run.folder, "--data-dir", run.shards, "--init-from", run.initial]
    flags = [*map(str, folders), *fixed.split(), *shlex.split(recipe.flags)]
    return parse("pretrain", PretrainSettings, flags)


def measuring(training: Pretraining, curve: Curve) -> Callable[[int], None]:
    """Return what `Pretraining.run` calls after each step, when its clock stands: it adds the points of the curve."""
    epoch = training.plan.batches.epochs[0]
    tokens_per_step = epoch.samples.lengths(training.settings.sampling).sum() / epoch.bins  # the mean

    def on_step(step: int) -> None:
        seconds = training.progress.seconds
        curve.add_if_due(step, round(step * tokens_per_step), seconds, training.model.state_dict)

    return on_step


if __name__ == "__main__":
    main()
