"""Speed up a SentenceTransformer: sentence_embeddings.py [FOLDER]. Requires `pip install sentence-transformers`."""

import sys
import tempfile
from pathlib import Path

import numpy as np
from sentence_transformers import SentenceTransformer
from tiny_model import save_tiny_model

import bertfast

with tempfile.TemporaryDirectory() as temporary:
    source = sys.argv[1] if len(sys.argv) > 1 else save_tiny_model(Path(temporary), bertfast.BertModel)
    model = SentenceTransformer(source, device="cpu")
    texts = ["A short text.", "A text that is a little longer.", "The second reading agreed with the first."]
    before = model.encode(texts)
    print(bertfast.patch(model))
    np.testing.assert_allclose(model.encode(texts), before, rtol=1e-4, atol=1e-4)
    print("embeddings agree:", before.shape)  # (3, 128)
