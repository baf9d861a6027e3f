"""A sentiment task that a tiny model learns in seconds: does the sentence contain "good" or "bad"?"""

import random
from pathlib import Path

FILLERS = ["the", "a", "film", "plot", "actor", "scene", "was", "is", "and", "music", "with", "very"]
QUICK = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "device": "cpu", "precision": "fp32"}


def sentence(random_: random.Random, *words: str) -> str:
    """Return a sentence with `words`, in order, at random positions among fillers."""
    positions = sorted(random_.sample(range(6), len(words)))
    parts = random_.choices(FILLERS, k=6)
    for position, word in zip(positions, words, strict=True):
        parts[position] = word
    return " ".join(parts)


def write_sentiment(path: Path, rows: int, *, seed: int) -> Path:
    """Write a .tsv file of sentences that contain "good" or "bad", which is also the label."""
    random_ = random.Random(seed)
    labels = [random_.choice(["bad", "good"]) for _ in range(rows)]
    lines = [f"{i}\t{sentence(random_, label)}\t{label}" for i, label in enumerate(labels)]
    path.write_text("\n".join(["index\tsentence\tlabel", *lines]) + "\n")
    return path


def rows_of(path: Path) -> list[list[str]]:
    """Return the fields of each line of a .tsv file."""
    return [line.split("\t") for line in path.read_text().splitlines()]
