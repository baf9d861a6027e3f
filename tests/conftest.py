"""What every test may ask for."""

from pathlib import Path

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--part", default="1/1", help="i/n: every n-th test from the i-th on, for in_parts.py")


def pytest_collection_modifyitems(config, items):
    part, parts = map(int, config.getoption("part", "1/1").split("/"))
    items[:] = items[part - 1 :: parts]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of text, vocabularies and checkpoints beside the repository; without it the test is skipped."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"there is no {folder}")
    return folder


@pytest.fixture
def unwritten_memory_is_nan():
    """Memory that no one wrote is NaN, so that a result that reads it shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> Path:
    """A model, with the heads of pre-training, that has learned nothing yet."""
    # Here, since the kernels' tests also run where there are no tokenizers.
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
