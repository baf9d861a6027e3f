"""A tiny model, the files of a task, what fine-tuning makes of them, and a text to pre-train on."""

from pathlib import Path

import numpy as np
import pytest
from sentiment import QUICK, write_sentiment

from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.training.finetune import FinetuneSettings, finetune


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """The sentiment task's three files, the last without labels."""
    folder = tmp_path_factory.mktemp("sentiment")
    train = write_sentiment(folder / "train.tsv", 320, seed=0)
    validation = write_sentiment(folder / "validation.tsv", 60, seed=1)
    test = folder / "test.tsv"
    test.write_text("".join(line.rsplit("\t", 1)[0] + "\n" for line in validation.read_text().splitlines()))
    return {"train_file": str(train), "validation_file": str(validation), "test_file": str(test)}


@pytest.fixture(scope="session")
def tuned(pretrained, files, tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the metrics of a run on it."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = FinetuneSettings(model_name_or_path=str(pretrained), output_dir=str(folder), **files, **QUICK)
    return folder, finetune(settings)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file in a small language: each subject has a verb and an object of its own."""
    generator = np.random.default_rng(0)
    words = [f"w{chr(97 + i)}{chr(97 + j)}" for i in range(6) for j in range(4)]
    lines = []
    for _ in range(120):
        for _ in range(generator.integers(4, 12)):
            first = generator.integers(len(words) // 3) * 3
            lines.append(" ".join([*words[first : first + 3], words[generator.integers(len(words))]]) + ".")
        lines.append("")
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory) -> Path:
    """The same as token shards."""
    folder = tmp_path_factory.mktemp("shards")
    settings = CorpusSettings([str(corpus)], vocab_size=128, validation_split_percentage=20, processes=1)
    return prepare(PrepareSettings(str(folder), settings))
