"""Metrics of a run: `metrics.jsonl` with one JSON object per line, further writers, and a plot of the losses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bertfast.data.text_files import json_object, read_lines
from bertfast.runtime.atomic_write import named_in_errors, write_atomically
from bertfast.runtime.extras import install_command
from bertfast.runtime.plotting import COLORS, draw, draw_smoothed
from bertfast.training.report_settings import MetricsWriterSettings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Entry = dict[str, Any]

MetricsWriter = Callable[[Entry, int], None]
"""Receives the values of an entry and its step."""


def tensorboard(folder: Path) -> MetricsWriter:
    """Return a writer of TensorBoard event files in `folder`/tensorboard.

    Raises:
        ImportError: TensorBoard is not installed.
        OSError: The folder cannot be written; also raised by the writer.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError(f"--tensorboard requires TensorBoard: {install_command('tensorboard')}") from None
    path = folder / "tensorboard"
    with named_in_errors(path):
        writer = SummaryWriter(str(path))

    def write(entry: Entry, step: int) -> None:
        with named_in_errors(path):
            for name, value in entry.items():
                if isinstance(value, int | float):
                    writer.add_scalar(name, value, step)
            writer.flush()

    return write


def wandb(folder: Path, settings: dict[str, Any]) -> MetricsWriter:
    """Return a writer to Weights & Biases; the run is named after the folder.

    Raises:
        ImportError: The library is not installed.
        ValueError: The library reports an error, such as a missing login; also raised by the writer.
        OSError: The folder cannot be written; also raised by the writer.
    """
    try:
        import wandb as library  # type: ignore[import-not-found]  # not a requirement
    except ImportError:
        raise ImportError("--wandb requires `pip install wandb`") from None

    @contextmanager
    def described() -> Iterator[None]:
        try:
            with named_in_errors(folder / "wandb"):
                yield
        except library.Error as error:
            raise ValueError(f"--wandb: {error} (WANDB_MODE=offline in the environment needs no account)") from error

    with described():
        run = library.init(name=folder.name, dir=str(folder), config=settings, resume="allow")

    def write(entry: Entry, step: int) -> None:
        with described():
            run.log(entry, step=step)

    return write


def open_writers(folder: Path, settings: MetricsWriterSettings, values: dict[str, Any]) -> list[MetricsWriter]:
    """Return the writers of metrics that the settings name.

    Args:
        folder: Output folder of the run.
        settings: Which libraries receive the metrics.
        values: All settings of the run, by name.

    Raises:
        ImportError: A library is not installed.
        OSError: A file cannot be written.
        ValueError: A library reports an error.
    """
    writers = [tensorboard(folder)] if settings.tensorboard else []
    return writers + ([wandb(folder, values)] if settings.wandb else [])


def read_entries(path: Path) -> list[Entry]:
    """Return the entries of a metrics.jsonl; without the file, none.

    Raises:
        ValueError: A line is not an entry; the message names it.
    """
    if not path.exists():
        return []
    example, entries = '{"step": 1}', []
    for number, line in read_lines(path):
        if line.endswith("\n"):  # a kill may cut the last line short
            entry = json_object(f"{path}, line {number}", line, example)
            if not isinstance(entry.get("step"), int):
                raise ValueError(f"{path}, line {number}: not an entry like {example}; remove the line")
            entries.append(entry)
    return entries


class MetricsLog:
    """Log of a run's metrics in `folder/metrics.jsonl`; every entry has a step."""

    def __init__(self, folder: Path, *, steps_done: int = 0, writers: Sequence[MetricsWriter] = ()):
        """Open the log.

        Args:
            folder: Output folder of the run.
            steps_done: Steps of the checkpoint to continue from; later entries, of an interrupted run, are dropped.
            writers: Receive every entry as well.
        """
        self.path, self.writers = folder / "metrics.jsonl", writers
        kept: list[Entry] = [entry for entry in self.entries() if entry["step"] <= steps_done] if steps_done else []
        write_atomically(self.path, "".join(json.dumps(entry) + "\n" for entry in kept))

    def entries(self) -> list[Entry]:
        """Return all entries so far."""
        return read_entries(self.path)

    def write(self, **entry: Any) -> None:
        """Append an entry."""
        with named_in_errors(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for writer in self.writers:
            writer({name: value for name, value in entry.items() if name != "step"}, entry["step"])

    def plot(self, path: Path, title: str, unigram_entropy: float | None = None) -> bool:
        """Plot the masked-LM losses over the steps.

        Args:
            path: Image file to write.
            title: Title of the plot.
            unigram_entropy: Unigram baseline in nats per masked token, drawn as a line; None: left out.

        Returns:
            False if matplotlib (the extra `plots`) is not installed.
        """
        entries = self.entries()

        def paint(axes: Axes) -> None:
            curves = (("masked_lm_loss", "training", ""), ("validation_loss", "validation", "o"))
            for (key, label, marker), color in zip(curves, (COLORS["bertfast"], "tab:green"), strict=True):
                points = [(entry["step"], entry[key]) for entry in entries if key in entry]
                if not points:
                    continue
                steps, values = zip(*points, strict=True)
                if marker:
                    axes.plot(steps, values, label=label, color=color, marker=marker, linewidth=1)
                else:
                    draw_smoothed(axes, steps, values, label, color)
            if unigram_entropy is not None:
                axes.axhline(unigram_entropy, linestyle=":", color="tab:gray", label="unigram baseline")
            axes.set(title=title, xlabel="step", ylabel="masked-LM loss (nats per masked token)")
            axes.legend()
            axes.grid(alpha=0.3)

        return draw(path, (8, 4.5), paint)
