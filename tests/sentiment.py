"""A task that a tiny model learns in seconds: is the sentence with "good" in it, or the one with "bad"?"""

import random
from pathlib import Path

FILLERS = ["the", "a", "film", "plot", "actor", "scene", "was", "is", "and", "music", "with", "very"]
QUICK = {"per_device_train_batch_size": 16, "learning_rate": 3e-3, "device": "cpu", "precision": "fp32"}


def sentence(random_: random.Random, *words: str) -> str:
    """Words in order at random places among fillers."""
    places = sorted(random_.sample(range(6), len(words)))
    parts = random_.choices(FILLERS, k=6)
    for place, word in zip(places, words, strict=True):
        parts[place] = word
    return " ".join(parts)


def write_sentiment(path: Path, rows: int, *, seed: int) -> Path:
    """Sentences with "good" or "bad" in them, and which of both as the label."""
    random_ = random.Random(seed)
    labels = [random_.choice(["bad", "good"]) for _ in range(rows)]
    lines = [f"{i}\t{sentence(random_, label)}\t{label}" for i, label in enumerate(labels)]
    path.write_text("\n".join(["index\tsentence\tlabel", *lines]) + "\n")
    return path


def rows_of(path: Path) -> list[list[str]]:
    """The fields of every line of a .tsv file."""
    return [line.split("\t") for line in path.read_text().splitlines()]
