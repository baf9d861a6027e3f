"""Fixtures of the tests of models."""

import pytest
from checkpoints import MASKED_LM
from parity import models


@pytest.fixture
def folder(tmp_path):
    """The folder of a masked-LM model, written by transformers."""
    models(MASKED_LM)[1].save_pretrained(tmp_path)
    return tmp_path
