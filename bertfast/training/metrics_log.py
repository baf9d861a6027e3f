"""What a run says of itself: `metrics.jsonl`, one JSON object a line, and a picture of its losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from bertfast.runtime.plotting import draw

Sink = Callable[[dict, int], None]
"""Takes an entry's numbers and its step."""


def tensorboard(folder: Path) -> Sink:
    """To TensorBoard's files in `folder`/tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("--tensorboard wants `pip install bertfast[tensorboard]`") from None
    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(entry: dict, step: int) -> None:
        for name, value in entry.items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, step)
        writer.flush()

    return write


def wandb(folder: Path, settings: dict) -> Sink:
    """To Weights & Biases, under the folder's name."""
    try:
        import wandb as library
    except ImportError:
        raise ImportError("--wandb wants `pip install wandb`") from None
    run = library.init(name=folder.name, dir=str(folder), config=settings, resume="allow")
    return lambda entry, step: run.log(entry, step=step)


class Journal:
    """The metrics of a run in `folder/metrics.jsonl`; each entry has its step."""

    def __init__(self, folder: Path, *, steps_done: int = 0, also: Sequence[Sink] = ()):
        """Go on after `steps_done` steps: entries of later ones, from a run that was cut off, are dropped.

        Numbers go to those of `also` too.
        """
        self.path, self.also = folder / "metrics.jsonl", also
        kept = [entry for entry in self.entries() if entry["step"] <= steps_done] if steps_done else []
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def entries(self) -> list[dict]:
        """All entries so far."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # a killed process leaves half a line

    def write(self, **entry) -> None:
        """Append an entry."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for sink in self.also:
            sink({name: value for name, value in entry.items() if name != "step"}, entry["step"])

    def plot(self, path: Path, *, unigram_entropy: float | None = None) -> bool:
        """Draw the masked-LM losses over the steps; False where matplotlib (the extra `plots`) is not installed."""
        entries = self.entries()

        def paint(axes) -> None:
            for key, style in (("masked_lm_loss", {"linewidth": 1}), ("validation_loss", {"marker": "o"})):
                points = [(entry["step"], entry[key]) for entry in entries if key in entry]
                if points:
                    axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
            if unigram_entropy is not None:
                axes.axhline(unigram_entropy, linestyle=":", color="gray", label="unigram entropy")
            axes.set(xlabel="step", ylabel="nats per masked token")
            axes.legend()
            axes.grid(alpha=0.3)

        return draw(path, (8, 4.5), paint)
