"""A model and its tokenizer are opened together, or it is said why they do not belong together."""

import pytest
from tokenizers import Tokenizer
from transformers import BertConfig

from bertfast.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from bertfast.tasks.pretrained import open_tokenizer


@pytest.fixture
def tokenizer(tmp_path) -> Tokenizer:
    """A tokenizer of 105 tokens in the folder `tmp_path`."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_TOKENS, *(f"w{i}" for i in range(100))]))
    return load_tokenizer(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer, tmp_path):
    with pytest.raises(
        ValueError, match="has 105 tokens, but the model's vocab_size is 104: they do not belong together"
    ):
        open_tokenizer(tmp_path, BertConfig(vocab_size=104))


@pytest.mark.parametrize(("vocab_size", "warned"), [(105, False), (128, False), (616, False), (617, True)])
def test_a_much_smaller_tokenizer_is_warned_of(tokenizer, tmp_path, caplog, vocab_size, warned):
    open_tokenizer(tmp_path, BertConfig(vocab_size=vocab_size))
    assert ("check that they belong together" in caplog.text) == warned
