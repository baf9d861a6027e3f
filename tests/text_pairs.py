"""Files of pairs and triplets of texts, similar if they consist of the same words, which a tiny model learns."""

import itertools
import random
from pathlib import Path

from sentiment import FILLERS

WORDS = [*FILLERS, "good", "bad"]
HEADERS = {
    "pairs": ["anchor", "positive"],
    "triplets": ["anchor", "positive", "negative"],
    "scored": ["sentence1", "sentence2", "score"],
    "labelled": ["sentence1", "sentence2", "label"],
}


def rows_of(form: str, rows: int, seed: int) -> list[list[str]]:
    """Return rows of one of `HEADERS`, of which no text occurs twice."""
    random_ = random.Random(seed)
    keys = random_.sample([*itertools.combinations(WORDS, 4)], 2 * rows)
    found = []
    for key, other in zip(keys[::2], keys[1::2], strict=True):
        anchor, positive = ([*key] for _ in range(2))
        random_.shuffle(anchor)
        positive.append(random_.choice(WORDS))
        if form in ("pairs", "triplets"):
            texts = [anchor, positive, [*other]][: len(HEADERS[form])]
            found.append([" ".join(words) for words in texts])
            continue
        kept = random_.choice([0, 4]) if form == "labelled" else random_.randint(0, 4)
        second = [*key[:kept], *other[kept:]]
        score = f"{int(kept > 0)}" if form == "labelled" else f"{kept + 0.5}"
        found.append([" ".join(anchor), " ".join(second), score])
    return found


def write_pairs(path: Path, form: str, rows: int, seed: int = 0) -> Path:
    """Write a .tsv file."""
    lines = ["\t".join(row) for row in [HEADERS[form], *rows_of(form, rows, seed)]]
    path.write_text("\n".join(lines) + "\n")
    return path
