"""What a run says of itself: `metrics.jsonl`, one JSON object a line, and a picture of its losses."""

from __future__ import annotations

import json
from pathlib import Path


class Journal:
    """The metrics of a run in `folder/metrics.jsonl`; each entry has its step."""

    def __init__(self, folder: Path, *, steps_done: int = 0):
        """Go on after `steps_done` steps: entries of later ones, from a run that was cut off, are dropped."""
        self.path = folder / "metrics.jsonl"
        kept = [entry for entry in self.entries() if entry["step"] <= steps_done] if steps_done else []
        self.path.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")

    def entries(self) -> list[dict]:
        """All entries so far."""
        if not self.path.exists():
            return []
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def write(self, **entry) -> None:
        """Append an entry."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def plot(self, path: Path, *, unigram_entropy: float | None = None) -> bool:
        """Draw the masked-LM losses over the steps; False where matplotlib (the extra `plots`) is not installed."""
        try:
            import matplotlib
        except ImportError:
            return False
        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        entries = self.entries()
        for key, style in (("masked_lm_loss", {"linewidth": 1}), ("validation_loss", {"marker": "o"})):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if points:
                axes.plot(*zip(*points, strict=True), label=key.replace("_", " "), **style)
        if unigram_entropy is not None:
            axes.axhline(unigram_entropy, linestyle=":", color="gray", label="unigram entropy")
        axes.set(xlabel="step", ylabel="nats per masked token")
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, dpi=120)
        pyplot.close(figure)
        return True
