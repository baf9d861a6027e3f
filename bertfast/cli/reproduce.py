"""`bertfast reproduce`: the tables of the paper (Devlin et al., 2019) with models and data that one has.

A recipe says what a table's rows pre-train and its cells fine-tune. What is finished is not done again, and the table
is written anew after each cell, the paper's figures beside ours.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from bertfast.cli.main import flags_of, parse
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.tasks.task import write_atomically
from bertfast.training.finetune import FinetuneSettings, finetune
from bertfast.training.pretrain import PretrainSettings, pretrain

_ABSENT = "no data"


@dataclass(kw_only=True)
class ReproduceSettings:
    """Which table, from what.

    Attributes:
        table: Its number in the paper: 1 GLUE, 2 and 3 SQuAD, 4 SWAG, 5 ablation, 6 sizes, 7 names, 8 masking.
        data: Folder with glue/NAME/{train,dev}.tsv.gz, squad/, swag/, wnut17/ and corpus/.
        output_dir: Folder for models, runs and the table; what is there already is not done again.
        recipes: Folder of table-N.yaml.
        model: A model for the rows that pre-train as usual; none: pre-train one.
        scale: Size of the models to pre-train.
        minutes: How long to pre-train each.
        tokens_per_batch: Of pre-training.
        learning_rate: Of fine-tuning; small models take more than the paper's.
        epochs: Of fine-tuning; none: the recipe's.
        seeds: Restarts of each fine-tuning, whose mean and spread are shown.
        only: Names of the columns to do now; none: all.
        device: cpu, cuda, cuda:1, …; none: a GPU if there is one.
    """

    table: int
    data: str
    output_dir: str
    recipes: str = "recipes/paper"
    model: str | None = None
    scale: str = "small"
    minutes: float = 5.0
    tokens_per_batch: int = 2048
    learning_rate: float = 1e-4
    epochs: float | None = None
    seeds: list[int] = field(default_factory=lambda: [42])
    only: list[str] = field(default_factory=list)
    device: str | None = None


def reproduce(settings: ReproduceSettings) -> Path:
    """Do what is left of a table; returns the Markdown file that holds it."""
    recipe = Path(settings.recipes, f"table-{settings.table}.yaml")
    if not recipe.is_file():
        raise FileNotFoundError(f"there is no recipe {recipe}: say with recipes where the folder is")
    table = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    folder = Path(settings.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"table-{settings.table}.md"
    cells = {}
    columns = [name for name in table["columns"] if not settings.only or name in settings.only]
    for row in table["rows"]:
        for name in columns:
            cells[row["name"], name] = _cell(settings, table, row, name, folder)
            write_atomically(page, render(table, cells, settings))
            if cells[row["name"], name] != _ABSENT:
                print(f"{row['name']}, {name}: {cells[row['name'], name]}", flush=True)
    print(page.read_text(encoding="utf-8"))
    return page


def render(table: dict, cells: dict[tuple[str, str], str], settings: ReproduceSettings) -> str:
    """The table as Markdown: each cell ours, and the paper's in brackets."""
    lines = [f"# {table['title']}", "", f"Ours (the paper's, {table['paper']}).", ""]
    lines += ["| | " + " | ".join(table["columns"]) + " |", "|---" * (len(table["columns"]) + 1) + "|"]
    for row in table["rows"]:
        theirs = row.get("paper", {})
        ours = [cells.get((row["name"], name), "") for name in table["columns"]]
        published = [f" ({theirs[name]})" if name in theirs else "" for name in table["columns"]]
        shown = map("".join, zip(ours, published, strict=True))
        lines.append(f"| {row['name']} | " + " | ".join(shown) + " |")
    said = f"learning rate {settings.learning_rate:g} where the recipe says no other, seeds {settings.seeds}"
    if settings.model is None or any("pretrain" in row for row in table["rows"]):
        said += f"; {settings.scale} models pre-trained for {settings.minutes:g} minutes each"
    return "\n".join([*lines, "", f"{table.get('note', '')}", "", f"Made with: {said}.", ""])


def _cell(settings: ReproduceSettings, table: dict, row: dict, name: str, folder: Path) -> str:
    """What stands in a cell, done now or before."""
    column = table["columns"][name]
    if column.get("metric") == "perplexity":
        last = Path(_model(settings, row, folder), "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1]
        return f"{json.loads(last)['validation_perplexity']:.2f}"
    files = {flag: Path(settings.data, column[flag]) for flag in ("train-file", "validation-file")}
    if not all(file.is_file() for file in files.values()):
        return _ABSENT
    scores = []
    for seed in settings.seeds:
        own = folder / f"{_plain(row['name'])}-{_plain(column.get('run', name))}-{seed}"  # columns may read one run
        if not (own / "all_results.json").exists():
            flags = {"learning-rate": settings.learning_rate} | table.get("finetune", {}) | column.get("finetune", {})
            flags |= row.get("finetune", {}) | {"task": column["task"], "seed": seed, **files}
            flags |= {"model-name-or-path": _model(settings, row, folder), "output-dir": own}
            flags["overwrite-output-dir"] = True  # what a run that was stopped has left there
            if settings.epochs is not None:
                flags["num-train-epochs"] = settings.epochs
            finetune(parse("finetune", FinetuneSettings, flags_of(flags | _where(settings))))
        results = json.loads((own / "all_results.json").read_text(encoding="utf-8"))
        scores.append(results[f"eval_{column['metric']}"] * column.get("times", 100))
    spread = f" ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.1f}{spread}"


def _model(settings: ReproduceSettings, row: dict, folder: Path) -> str:
    """The folder of a row's model, pre-trained now or before."""
    changes = row.get("pretrain", {})
    if settings.model is not None and not changes:
        return settings.model
    name = _plain(" ".join(f"{flag} {value}" for flag, value in changes.items())) or "usual"
    own = folder / f"model-{name}"
    if not (own / "config.json").exists():
        shards = prepare(PrepareSettings(str(folder / "shards"), _corpus(Path(settings.data, "corpus"))))
        flags = {
            "preset": settings.scale,
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
            "data-dir": shards,
            "output-dir": own,
            "resume": True,
            **changes,
        }
        pretrain(parse("pretrain", PretrainSettings, flags_of(flags | _where(settings))))
    return str(own)


def _corpus(folder: Path) -> CorpusSettings:
    files = {split: sorted(folder.glob(f"*-{split}*.txt.xz")) for split in ("train", "valid")}
    chosen = {split: [str(file) for file in some if "wikitext" not in file.name] for split, some in files.items()}
    return CorpusSettings(chosen["train"], chosen["valid"], vocabulary_size=16_384)


def _where(settings: ReproduceSettings) -> dict[str, str]:
    return {} if settings.device is None else {"device": settings.device}


def _plain(name: str) -> str:
    """A name that a folder can have."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
