"""`bertfast reproduce`: reproduce the tables of the BERT paper (Devlin et al., 2019) with your own models and data.

A recipe defines which models the rows of a table pre-train and which tasks its cells fine-tune on. Finished runs are
not repeated, and the table, which also shows the figures of the paper, is rewritten after each cell: as table-N.md, and
as table-N.json with the results of each run, its seed, commit, processor, precision and versions.
"""

from __future__ import annotations

import json
import logging
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch

from bertfast.architectures.presets import Preset
from bertfast.cli.flags import flags_of, parse
from bertfast.cli.recipes import read_yaml, recipes_folder
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.text_files import json_object, read_json, read_lines
from bertfast.runtime.atomic_write import write_atomically
from bertfast.runtime.machine import commit, processor
from bertfast.runtime.output_folder import RECORD, Origin, OriginError, output_folder, require_origin
from bertfast.runtime.settings import (
    Count,
    Epochs,
    NonNegative,
    Positive,
    Range,
    Seed,
    Settings,
    nearest,
    refuse_repeated,
)
from bertfast.runtime.signals import continued_by
from bertfast.runtime.versions import versions
from bertfast.training.checkpoint import has_begun
from bertfast.training.finetune_folder import RUN, finetune_origin, read_results
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.pretrain_checkpointing import pretrain_origin
from bertfast.training.pretrain_data import Corpus
from bertfast.training.pretrain_settings import resolve_objective
from bertfast.training.pretraining import PretrainSettings, pretrain

logger = logging.getLogger("bertfast")

_ABSENT = "no data"
# How messages call the types of a recipe's entries.
_KINDS = {str: "text", int: "a whole number", dict: "`name: value` lines", list: "a list"}
# Entries of a run's record that say where its results come from.
_ORIGIN = ("commit", "processor", "device", "threads", "processes", "precision", "versions")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: What the table shows.
        metric: Name of the metric.
        scores: Its value in each run, in the unit of the table.
        runs: Seed, origin and results of each run.
        pretraining: Precision, versions and settings of the pre-training of its model; None: it was given.
    """

    text: str
    metric: str = ""
    scores: list[float] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    pretraining: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class ReproduceSettings(Settings):
    """Which table to reproduce, and from what.

    Attributes:
        table: Number of the table in the paper: 1 GLUE, 2 and 3 SQuAD, 4 SWAG, 5 pre-training tasks, 6 model sizes,
            7 named entities, 8 masking.
        data: Folder with glue/NAME/{train,dev}.tsv.gz, squad/, swag/, wnut17/ and corpus/.
        output_dir: Folder for models, runs and the table; finished runs in it are not repeated.
        overwrite_output_dir: Replace runs of other models, data or settings in --output-dir; the others are kept.
        recipes: Folder with table-N.yaml. If not given: the recipes installed with bertfast.
        model_name_or_path: Model (folder or hub id) for the rows with the default pre-training. If not given: pre-train
            one.
        preset: Published size of the models to pre-train.
        minutes: Duration of each pre-training run in minutes.
        tokens_per_batch: Tokens per batch in pre-training.
        learning_rate: Peak learning rate of fine-tuning; small models need a higher one than those of the paper.
        num_train_epochs: Number of passes over the training data of fine-tuning. If not given: as in the recipe.
        seeds: Seeds of the fine-tuning runs of a cell, which shows their mean and standard deviation.
        only: Columns to fill in. If not given: all.
        device: Device such as "cpu" or "cuda:0". If not given: a GPU if one is available.
    """

    table: Annotated[int, Range(1, 8)]
    data: str
    output_dir: str
    overwrite_output_dir: bool = False
    recipes: str | None = None
    model_name_or_path: str | None = None
    preset: Preset = "small"
    minutes: Positive = 5.0
    tokens_per_batch: Count = 8192
    learning_rate: NonNegative = 1e-4
    num_train_epochs: Epochs | None = None
    seeds: list[Seed] = field(default_factory=lambda: [42])
    only: list[str] = field(default_factory=list)
    device: str | None = None

    def validate(self) -> None:
        refuse_repeated("seeds", self.seeds)


def reproduce(settings: ReproduceSettings) -> Path:
    """Run what is missing of a table.

    Returns:
        The Markdown file of the table; next to it is one in JSON.

    Raises:
        FileNotFoundError: There is no recipe of this table, no folder `data`, or none of the table's files in it.
        ValueError: `only` names a column that the table does not have, or a run in the folder has another origin.
    """
    recipes = Path(settings.recipes) if settings.recipes is not None else recipes_folder() / "paper"
    recipe = recipes / f"table-{settings.table}.yaml"
    if not recipe.is_file():
        raise FileNotFoundError(f"there is no recipe {recipe}: choose another --table, or the folder with --recipes")
    table = read_yaml(recipe, str(recipe))
    check_recipe(table, recipe)
    columns = _columns(settings, table)
    if settings.model_name_or_path is None or any("pretrain" in row for row in table["rows"]):
        _corpus(Path(settings.data, "corpus"))
    commit()  # before a later one is checked out
    cells: dict[tuple[str, str], Cell] = {}
    # Every run has a record of its own; tables may share runs.
    overwrite = settings.overwrite_output_dir
    with output_folder(Path(settings.output_dir), Origin(command="reproduce"), (), overwrite=overwrite) as folder:
        page = folder / f"table-{settings.table}.md"
        for row in table["rows"]:
            for name in columns:
                with continued_by("table"):
                    cells[row["name"], name] = cell = _cell(settings, table, row, name, folder)
                write_atomically(page, render(table, {key: each.text for key, each in cells.items()}, settings))
                write_atomically(page.with_suffix(".json"), json.dumps(_record(table, cells, settings), indent=1))
                if cell.text != _ABSENT:
                    logger.info("%s, %s: %s", row["name"], name, cell.text)
    print(page.read_text(encoding="utf-8"))
    return page


def check_recipe(table: dict[str, Any], path: Path) -> None:
    """Raise ValueError if a recipe lacks an entry, or has one of another type."""
    required = {"title": str, "paper": str, "columns": dict, "rows": list}
    _check_entries(table, str(path), required, {"finetune": dict, "note": str})
    for name, column in table["columns"].items():
        where = f"{path}: column {name}"
        _check_entries(column, where, {"metric": str}, {"finetune": dict, "run": str, "times": int})
        if column["metric"] != "perplexity":
            _check_entries(column, where, {"task": str, "train-file": str, "validation-file": str}, {})
    for number, row in enumerate(table["rows"], 1):
        optional = {"finetune": dict, "paper": dict, "pretrain": dict}
        _check_entries(row, f"{path}: row {number}", {"name": str}, optional)


def _check_entries(entries: object, where: str, required: Mapping[str, type], optional: Mapping[str, type]) -> None:
    """Raise ValueError if an entry is missing or of another type than the one given with its name."""
    if not isinstance(entries, dict):
        raise ValueError(f"{where} must hold `name: value` lines, got {entries!r:.60}")
    for name, kind in {**required, **optional}.items():
        if name in entries and not isinstance(entries[name], kind):
            raise ValueError(f"{where}: {name} must be {_KINDS[kind]}, got {entries[name]!r:.60}")
        if name in required and name not in entries:
            raise ValueError(f"{where} has no {name}")


def render(table: dict[str, Any], cells: dict[tuple[str, str], str], settings: ReproduceSettings) -> str:
    """Return the table as Markdown; each cell shows bertfast's result and, in parentheses, that of the paper."""
    lines = [f"# {table['title']}", "", f"bertfast (in parentheses: the paper, {table['paper']}).", ""]
    lines += ["| | " + " | ".join(table["columns"]) + " |", "|---" * (len(table["columns"]) + 1) + "|"]
    for row in table["rows"]:
        paper = row.get("paper", {})
        results = [cells.get((row["name"], name), "") for name in table["columns"]]
        published = [f" ({paper[name]})" if name in paper else "" for name in table["columns"]]
        shown = map("".join, zip(results, published, strict=True))
        lines.append(f"| {row['name']} | " + " | ".join(shown) + " |")
    used = f"learning rate {settings.learning_rate:g} unless the recipe sets one, seeds {settings.seeds}"
    if len(settings.seeds) > 1:
        used += "; ± is the sample standard deviation over the seeds of fine-tuning"
    if settings.model_name_or_path is None or any("pretrain" in row for row in table["rows"]):
        used += f"; {settings.preset} models pre-trained for {settings.minutes:g} minutes each, with one seed"
    return "\n".join([*lines, "", f"{table.get('note', '')}", "", f"Settings: {used}.", ""])


def _record(
    table: dict[str, Any], cells: Mapping[tuple[str, str], Cell], settings: ReproduceSettings
) -> dict[str, Any]:
    """Return the table for a JSON file, without paths of this machine; its origin is that of this call."""
    paper = {row["name"]: row.get("paper", {}) for row in table["rows"]}
    model = settings.model_name_or_path
    return {
        "origin": {
            "date": date.today().isoformat(),
            "commit": commit(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "python": versions()["python"],
            "versions": {name: found for name, found in versions().items() if name != "python"},
        },
        "title": table["title"],
        "model": None if model is None else Path(model).name,
        "preset": settings.preset,
        "minutes": settings.minutes,
        "learning_rate": settings.learning_rate,
        "seeds": settings.seeds,
        "cells": [
            {"row": row, "column": column, "paper": paper[row].get(column), **asdict(cell)}
            for (row, column), cell in cells.items()
        ],
    }


def _columns(settings: ReproduceSettings, table: dict[str, Any]) -> list[str]:
    """Return the names of the columns to fill in, after checking that there is data for at least one of them."""
    for name in settings.only:
        if name not in table["columns"]:
            known = list(table["columns"])
            hint = nearest(name, known) or f"; its columns are {', '.join(known)}"
            raise ValueError(f"--only {name}: table {settings.table} has no such column{hint}")
    names = [name for name in table["columns"] if not settings.only or name in settings.only]
    data = Path(settings.data)
    if not data.is_dir():
        raise FileNotFoundError(f"--data {data}: no such folder")
    # Perplexity needs no labelled data, but the text to pre-train on.
    needed = [_files(table["columns"][name], data) or [data / "corpus"] for name in names]
    if not any(all(path.exists() for path in paths) for paths in needed):
        listed = sorted({str(path.relative_to(data)) for paths in needed for path in paths})
        raise FileNotFoundError(
            f"--data {data} has no data for table {settings.table}: it requires {', '.join(listed)}"
        )
    return names


def _files(column: dict[str, Any], data: Path) -> list[Path]:
    """Return the training and the validation file of a column; none for perplexity."""
    return [data / column[name] for name in ("train-file", "validation-file") if name in column]


def _cell(settings: ReproduceSettings, table: dict[str, Any], row: dict[str, Any], name: str, folder: Path) -> Cell:
    """Return a cell, after the runs that it still needs."""
    column = table["columns"][name]
    if column.get("metric") == "perplexity":
        model = _model(settings, row, folder)
        perplexity = _perplexity(Path(model, "metrics.jsonl"))
        return Cell(f"{perplexity:.2f}", "perplexity", [perplexity], [], _pretraining(model, folder))
    train, validation = _files(column, Path(settings.data))
    if not (train.is_file() and validation.is_file()):
        return Cell(_ABSENT)
    files = {"train-file": train, "validation-file": validation}
    scores, runs, model = [], [], _model(settings, row, folder)
    for seed in settings.seeds:
        # Several columns may show metrics of the same run.
        run = folder / f"{_plain(row['name'])}-{_plain(column.get('run', name))}-{seed}"
        flags = {"learning-rate": settings.learning_rate} | table.get("finetune", {}) | column.get("finetune", {})
        flags |= row.get("finetune", {}) | {"task": column["task"], "seed": seed, **files}
        flags |= {"model-name-or-path": model, "output-dir": run}
        if settings.num_train_epochs is not None:
            flags["num-train-epochs"] = settings.num_train_epochs
        results = _results(parse("finetune", FinetuneSettings, flags_of(flags | _where(settings))), run, settings)
        score = results.get(f"eval_{column['metric']}")
        if score is None:
            known = ", ".join(key.removeprefix("eval_") for key in results if key.startswith("eval_"))
            raise ValueError(f"column {name}: {run} has no {column['metric']}; give the recipe one of {known}")
        scores.append(score * column.get("times", 100))
        record = read_json(run / RUN) if (run / RUN).exists() else {}  # an earlier version wrote none
        origin = {key: record[key] for key in _ORIGIN if key in record}
        runs.append({"run": run.name, "seed": seed, **origin, "results": results})
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    text = f"{statistics.mean(scores):.1f}{spread}"
    return Cell(text, column["metric"], scores, runs, _pretraining(model, folder))


def _results(finetuning: FinetuneSettings, run: Path, settings: ReproduceSettings) -> dict[str, Any]:
    """Return the results of a fine-tuning run, which is not repeated if it is finished."""
    stale = has_begun(run) and _is_stale(run, finetune_origin(finetuning, "finetune"), settings)
    results = None if stale else read_results(run)
    if results is None:
        resume = has_begun(run) and not stale
        results = finetune(finetuning.replace(overwrite_output_dir=stale, resume=resume))
    return results


def _pretraining(model: str, folder: Path) -> dict[str, Any] | None:
    """Return the precision, the versions and the settings of a model that was pre-trained in `folder`; else None."""
    if Path(model).parent != folder:
        return None
    record = read_json(Path(model, RECORD))
    return {"precision": record["settings"].get("--precision")} | {key: record[key] for key in ("versions", "settings")}


def _perplexity(metrics: Path) -> float:
    """Return the last validation perplexity of a pre-training run."""
    number, line = (*read_lines(metrics), (1, ""))[-2]
    perplexity = json_object(f"{metrics}, line {number}", line, '{"validation_perplexity": 9}').get(
        "validation_perplexity"
    )
    if not isinstance(perplexity, float):
        raise ValueError(f"{metrics} is damaged: it has no validation_perplexity; pass --overwrite-output-dir")
    return perplexity


def _model(settings: ReproduceSettings, row: dict[str, Any], folder: Path) -> str:
    """Return the folder of a row's model, after pre-training it if it does not exist."""
    changes = row.get("pretrain", {})
    if settings.model_name_or_path is not None and not changes:
        return settings.model_name_or_path
    name = _plain(" ".join(f"{flag} {value}" for flag, value in changes.items())) or "default"
    model = folder / f"model-{name}"
    corpus = _corpus(Path(settings.data, "corpus"))
    shards = prepare(
        PrepareSettings(str(folder / "shards"), corpus, overwrite_output_dir=settings.overwrite_output_dir)
    )
    flags = {
        "preset": settings.preset,
        "max-seq-length": 128,
        "tokens-per-batch": settings.tokens_per_batch,
        "minutes": settings.minutes,
        "optimizer": "muon",
        "learning-rate": 0.003,
        "adam-beta2": 0.98,
        "warmup-ratio": 0.05,
        "dropout": 0,
        "eval-batches": 20,
        "eval-steps": 10**6,
        "save-steps": 50,  # a minute or two on a CPU
        "data-dir": shards,
        "output-dir": model,
        **changes,
    }
    pretraining = parse("pretrain", PretrainSettings, flags_of(flags | _where(settings)))
    pretraining = resolve_objective(pretraining, pretraining.model.architecture)  # as the run records it
    origin = pretrain_origin(pretraining, None, Corpus.of(shards).hashes())
    stale = has_begun(model) and _is_stale(model, origin, settings)
    if stale or not (model / "config.json").exists():
        pretrain(pretraining.replace(overwrite_output_dir=stale, resume=has_begun(model) and not stale))
    return str(model)


def _is_stale(run: Path, origin: Origin, settings: ReproduceSettings) -> bool:
    """Return whether a run has another origin and is to be replaced.

    Raises:
        OriginError: It has another origin and is not to be replaced.
    """
    try:
        require_origin(run, origin)
    except OriginError:
        if not settings.overwrite_output_dir:
            raise
        return True
    return False


def _corpus(folder: Path) -> CorpusSettings:
    """Return the text to pre-train on; FileNotFoundError if there is none."""
    files = {split: sorted(folder.glob(f"*-{split}*.txt.xz")) for split in ("train", "valid")}
    chosen = {split: [str(file) for file in found if "wikitext" not in file.name] for split, found in files.items()}
    if not chosen["train"]:
        raise FileNotFoundError(
            f"{folder} has no *-train*.txt.xz to pre-train on: add one to --data, or give --model-name-or-path if the "
            "table needs no other model"
        )
    return CorpusSettings(chosen["train"], chosen["valid"], vocab_size=16_384)


def _where(settings: ReproduceSettings) -> dict[str, str]:
    return {} if settings.device is None else {"device": settings.device}


def _plain(name: str) -> str:
    """Return a name that is valid for a folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
