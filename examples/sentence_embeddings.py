"""Speed up a SentenceTransformer: sentence_embeddings.py [FOLDER]."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from transformers import BertConfig, BertModel, BertTokenizer

import bertfast


def save_tiny_model(folder: str) -> None:
    """Write a random BERT whose vocabulary is the alphabet."""
    vocab = Path(folder, "vocab.txt")
    vocab.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]))
    BertTokenizer(str(vocab)).save_pretrained(folder)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    BertModel(BertConfig(vocab_size=31, **sizes)).save_pretrained(folder)


with tempfile.TemporaryDirectory() as folder:
    if len(sys.argv) == 1:
        save_tiny_model(folder)
    model = SentenceTransformer(sys.argv[1] if len(sys.argv) > 1 else folder, device="cpu")
    texts = ["a b c", "d e f g h i", "j"]
    before = model.encode(texts)
    print(bertfast.patch(model))
    np.testing.assert_allclose(model.encode(texts), before, rtol=1e-4, atol=1e-4)
    print("embeddings agree:", before.shape)
