"""What bertfast and transformers learn per minute: losses at the end of the time, and curves."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.figures import hardware, save
from bench.page.rows import Result
from bench.page.text import table

PROGRAM = "learning_per_minute"
SETS = ("sentences", "chunks")  # of masked tokens
DEFAULTS = "transformers-defaults"


def is_learning(result: Result) -> bool:
    """Return whether a result is one of `bench.end_to_end.learning_per_minute`."""
    return result.name.startswith(f"{PROGRAM}-")


@dataclass(frozen=True)
class Group:
    """The runs of a recipe that differ in nothing but their seed."""

    runs: Sequence[Result]

    @property
    def recipe(self) -> str:
        return str(self.runs[0].values["recipe"])

    @property
    def side(self) -> str:
        return str(self.runs[0].values["side"])

    @property
    def title(self) -> str:
        """The recipe and its duration."""
        return f"{self.recipe}, {self.runs[0].values['minutes']:g} min"

    def losses(self, name: str) -> list[float]:
        """Return the losses at the end of each run on a set of masked tokens."""
        return [float(run.values["curve"][-1][name]) for run in self.runs]

    def loss(self, name: str) -> float:
        """Return the mean loss at the end of the runs on a set of masked tokens."""
        return statistics.mean(self.losses(name))

    def mean(self, key: str) -> float:
        """Return the mean of an entry of the result files."""
        return statistics.mean(float(run.values[key]) for run in self.runs)


def groups_of(results: Iterable[Result]) -> dict[str, list[Group]]:
    """Return the groups of each text, the best first.

    Raises:
        ValueError: The runs of a text were not measured on the same masked tokens.
    """
    groups: dict[tuple[str, ...], list[Result]] = {}
    measured: dict[str, object] = {}
    for result in filter(is_learning, results):
        values = result.values
        if measured.setdefault(values["text"], values["validation"]) != values["validation"]:
            raise ValueError(f"{result.file} was measured on other masked tokens than the files before it: remove it")
        key = (values["text"], values["recipe"], f"{values['minutes']:g}", values["precision"], values["preset"])
        groups.setdefault(key, []).append(result)
    by_text: dict[str, list[Group]] = {}
    for (text, *_), runs in groups.items():
        by_text.setdefault(text, []).append(Group(runs))
    return {text: sorted(found, key=lambda group: group.loss("chunks")) for text, found in by_text.items()}


def pairs_of(groups: Sequence[Group]) -> list[tuple[str, Group, Group]]:
    """Return what is compared: a title, transformers' runs, and those of bertfast that are to reach their loss."""
    slow, fast = ([group for group in groups if group.side == side] for side in ("transformers", "bertfast"))
    same = {group.recipe.partition("-")[2] for group in slow}
    pairs = [
        ("the same recipe", target, group)
        for target in slow
        for group in fast
        if group.recipe.partition("-")[2] == target.recipe.partition("-")[2]
    ]
    own = [group for group in fast if group.recipe.partition("-")[2] not in same]
    tuned = [group for group in slow if not group.recipe.startswith(DEFAULTS)]
    untouched = [group for group in slow if group.recipe.startswith(DEFAULTS)]
    best = f"the best of {len(tuned)} learning rates of transformers" if len(tuned) > 1 else "transformers"
    pairs += [(best, target, group) for target in tuned[:1] for group in own]
    return pairs + [("transformers' defaults", target, group) for target in untouched for group in own]


def learning_text(results: list[Result], folder: Path) -> str:
    """Return the section of a processor, "" without results.

    Args:
        results: Results of the processor.
        folder: That of all results.
    """
    by_text = groups_of(results)
    if not by_text:
        return ""
    first = next(filter(is_learning, results))
    masked = "; ".join(f"{text} {masked_tokens(groups[0].runs[0])}" for text, groups in by_text.items())
    parts = [
        "### Learning per minute\n\n"
        f"`bertfast pretrain` and transformers' run_mlm (its data, collator and Trainer) train `mini` with a "
        "vocabulary of 8,192 on at most 128 tokens per sequence, from the same random weights per seed, until the "
        "stated time of steps, at which the learning rate is 0. The loss is that of transformers' model in fp32, "
        "outside of that time, on fixed masked tokens of validation text: *sentences* are cut as bertfast cuts them, "
        f"*chunks* as run_mlm does (masked tokens: {masked}). Recipes, in `bench/end_to_end/learning_per_minute.py`, "
        'that have the same name after the side, as in "adamw-0.001", are the same on both sides. Of transformers, '
        "only the learning rate is varied, with 2,048 tokens per step, or its defaults are kept; recipes of bertfast "
        "are compared on the books. ± is the standard deviation over seeds. The runs do not show what larger models, "
        "longer runs or other text would give. Files: "
        f"`bench/results/{Path(first.file).parent.as_posix()}/{PROGRAM}-*.json`.\n"
    ]
    columns = ["text", "recipe", "precision", "seeds", "M tokens", "tokens/s", "loss, sentences", "loss, chunks"]
    parts.append(table(columns, [cells_of(text, group) for text, groups in by_text.items() for group in groups]) + "\n")
    pairs = pairs_of(by_text.get("wikipedia", []))
    if pairs:
        columns = ["compared with", "transformers", "bertfast", "bertfast reaches its mean loss"]
        parts.append(table(columns, [pair_cells(*pair) for pair in pairs]) + "\n")
    plot = Path(first.file).with_name(f"{PROGRAM}.png")
    if (folder / plot).is_file():
        parts.append(f"![Loss against minutes](../bench/results/{plot.as_posix()})\n")
    return "\n".join(parts)


def masked_tokens(run: Result) -> str:
    """Return the numbers of masked tokens that a run was measured on, as "9,599 in sentences and 9,622 in chunks"."""
    return " and ".join(f"{run.values['validation'][name]['masked']:,} in {name}" for name in SETS)


def cells_of(text: str, group: Group) -> list[str]:
    """Return the cells of a group."""
    seeds = ", ".join(str(run.values["seed"]) for run in group.runs)
    speed = [f"{group.mean('tokens') / 1e6:.1f}", f"{group.mean('tokens_per_second'):,.0f}"]
    precision = str(group.runs[0].values["precision"])
    return [text, group.title, precision, seeds, *speed, *(loss_text(group, name) for name in SETS)]


def loss_text(group: Group, name: str) -> str:
    """Return the mean loss of a group on a set, with its spread if there are several seeds."""
    losses = group.losses(name)
    return f"{statistics.mean(losses):.3f}" + (f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else "")


def pair_cells(title: str, target: Group, group: Group) -> list[str]:
    """Return the cells of a comparison."""
    reached = [name for name in SETS if group.loss(name) <= target.loss(name)]
    answer = "yes" if len(reached) == len(SETS) else f"on {reached[0]} only" if reached else "no"
    losses = [" / ".join(f"{of.loss(name):.3f}" for name in SETS) for of in (target, group)]
    return [title, f"{target.title}: {losses[0]}", f"{group.title}: {losses[1]}", answer]


def draw_curves(results: list[Result], folder: Path) -> list[Path]:
    """Draw the curves on Wikipedia, a plot per folder of results; return the files."""
    from matplotlib import pyplot

    written = []
    for parent in sorted({Path(result.file).parent for result in results if is_learning(result)}):
        groups = groups_of(result for result in results if Path(result.file).parent == parent).get("wikipedia", [])
        if not groups:
            continue
        figure, axis = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        for index, group in enumerate(groups):
            for number, run in enumerate(group.runs):
                points = run.values["curve"]
                axis.plot(
                    [point["seconds"] / 60 for point in points],
                    [point["chunks"] for point in points],
                    "-" if group.side == "bertfast" else "--",
                    color=f"C{index}",
                    linewidth=1,
                    label=None if number else group.title,
                )
        runs = [run for group in groups for run in group.runs]
        title = f"BERT-{runs[0].values['preset']} on Wikipedia; {hardware(runs[0].origin)}"
        axis.set_title(title, fontsize="medium", loc="left")
        axis.set(xlabel="time of steps (min)", ylabel="loss on chunks (nats per masked token)")
        axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
        written.append(folder / parent / f"{PROGRAM}.png")
        save(figure, written[-1], [run.values for run in runs])
    return written
