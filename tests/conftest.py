"""Fixtures for all tests; they import programs when used, as kernel tests run without tokenizers."""

import importlib.util
import io
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

# For `import bench`, which is not installed. At the end, so that an installed bertfast comes before the checkout's.
sys.path.append(str(Path(__file__).parents[1]))


def pytest_addoption(parser):
    """Add the number of calls of tests/cli/test_bad_calls.py."""
    parser.addoption("--bad-calls", type=int, default=60, help="Calls with bad inputs to make.")


def pytest_configure(config):
    """Let `importorskip` skip only packages that are not installed: one that cannot be imported is a fault."""
    import_or_skip = pytest.importorskip

    def import_installed_or_skip(modname: str, *args, **kwargs):
        if importlib.util.find_spec(modname.partition(".")[0]) is not None:
            importlib.import_module(modname)
        return import_or_skip(modname, *args, **kwargs)

    pytest.importorskip = import_installed_or_skip


def pytest_make_parametrize_id(val, argname):
    """Name bytes by their parameter: the time in a gzip header would give each worker of pytest-xdist other names."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Return the folder `shared/data` next to the repository, with text and checkpoints; skip the test without it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture(autouse=True, scope="session")
def started_processes_are_no_workers():
    """Unset a variable by which pytest-benchmark takes a pytest started by a test for a worker of xdist."""
    os.environ.pop("PYTEST_XDIST_WORKER", None)


@pytest.fixture(autouse=True)
def short_batches_run_packed(monkeypatch):
    """Run short batches packed, as tests are about the packed encoder."""
    if "bertfast.encoder.kernel_support" in sys.modules:
        monkeypatch.setattr("bertfast.encoder.kernel_support.MIN_SLOTS_WITHOUT_PADDING", 0)


@pytest.fixture
def pipe(monkeypatch):
    """Return a function that makes its text or bytes the content of standard input."""

    def set_input(content: str | bytes) -> None:
        raw = io.BytesIO(content if isinstance(content, bytes) else content.encode())
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(raw), encoding="ascii"))

    return set_input


@pytest.fixture
def any_precision_runs(monkeypatch):
    """Run programs also in precisions, and with heads of sizes, for which the CPU has no kernels."""
    for program in ("tasks.pretrained", "training.pretrain_model", "inference.frozen"):
        monkeypatch.setattr(f"bertfast.{program}.require_packed", lambda model, precision: None)


@pytest.fixture
def unwritten_memory_is_nan():
    """Fill uninitialised memory with NaN, so that reading it shows in results."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """The folder of a model with the heads of pre-training and random weights."""
    from sentiment import FILLERS

    from bertfast import BertConfig, BertForPreTraining
    from bertfast.data.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("pretrained")
    tokenizer = train_tokenizer([" ".join([*FILLERS, "good", "bad"])] * 20, 256)
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    BertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> dict[str, str]:
    """The three files of a sentiment task, the last without labels."""
    from sentiment import write_sentiment

    folder = tmp_path_factory.mktemp("sentiment")
    train = write_sentiment(folder / "train.tsv", 320, seed=0)
    validation = write_sentiment(folder / "validation.tsv", 60, seed=1)
    test = folder / "test.tsv"
    test.write_text("".join(line.rsplit("\t", 1)[0] + "\n" for line in validation.read_text().splitlines()))
    return {"train_file": str(train), "validation_file": str(validation), "test_file": str(test)}


@pytest.fixture(scope="session")
def tuned(pretrained, files, tmp_path_factory) -> tuple[Path, dict]:
    """The folder and the metrics of a fine-tuning run on `files`."""
    from sentiment import QUICK

    from bertfast.training.finetuning import FinetuneSettings, finetune

    folder = tmp_path_factory.mktemp("tuned")
    settings = FinetuneSettings.of(model_name_or_path=str(pretrained), output_dir=str(folder), **files, **QUICK)
    return folder, finetune(settings)


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A text file in a small language in which each subject has its own verb and object."""
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
    """The folder of token shards of `corpus`."""
    from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare

    folder = tmp_path_factory.mktemp("shards")
    settings = CorpusSettings([str(corpus)], vocab_size=128, validation_split_percentage=20, processes=1)
    return prepare(PrepareSettings(str(folder), settings))
