"""sentence-transformers on a patched model: the same embeddings, padded or packed, and training."""

from pathlib import Path

import pytest
import torch
from family_models import PREFIXES, write_model
from parity import SIZES, transformers

import bertfast

st = pytest.importorskip("sentence_transformers", reason="the extra `examples`")
modules = pytest.importorskip("sentence_transformers.models")
losses_of = pytest.importorskip("sentence_transformers.losses")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = ["a b c d e f g", "h", "i j k", "l m n o p q r s t u v"]


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny BERT with its tokenizer."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(**SIZES)).save_pretrained(tmp_path)
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    return tmp_path


def encoder(folder: Path, pooling: str = "mean"):
    transformer = modules.Transformer(str(folder))
    return st.SentenceTransformer(modules=[transformer, modules.Pooling(SIZES["hidden_size"], pooling)], device="cpu")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_the_same(folder, pooling):
    model = encoder(folder, pooling)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    report = bertfast.patch(model)
    assert not report.left
    torch.testing.assert_close(model.encode(TEXTS, convert_to_tensor=True), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(int(st.__version__.split(".")[0]) < 6, reason="sentence-transformers 5 drops cu_seq_lens_q")
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_flattened_input_is_pooled_on_packed_rows(folder, pooling):
    model = encoder(folder, pooling)
    bertfast.patch(model)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    features = model.tokenize(TEXTS)
    lengths = features["attention_mask"].sum(1)
    starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    present = features["attention_mask"].bool()
    packed = {
        "input_ids": features["input_ids"][present][None],
        "token_type_ids": features["token_type_ids"][present][None],
        "position_ids": torch.cat([torch.arange(n) for n in lengths.tolist()])[None],
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }
    with torch.no_grad():
        got = model(dict(packed))["sentence_embedding"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_multiple_negatives_ranking_trains_the_same(folder):
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    transformers.AutoConfig.from_pretrained(folder, **without_dropout).save_pretrained(folder)
    losses = []
    for patched in (False, True):
        model = encoder(folder).train()
        if patched:
            bertfast.patch(model)
        loss_of = losses_of.MultipleNegativesRankingLoss(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for _ in range(5):
            loss = loss_of([model.tokenize(TEXTS), model.tokenize([text[:3] for text in TEXTS])], None)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_the_similarities_of_a_published_model_are_the_same():
    folder = next(Path(__file__).parents[2].glob("build/minilm/*/model"), None)
    if folder is None:
        pytest.skip("`make build/minilm` fetches all-MiniLM-L6-v2")
    model = st.SentenceTransformer(str(folder), device="cpu")
    texts = [
        "A man is eating food.",
        "Someone eats.",
        "The girl is carrying a baby, and she smiles at the people who pass by on the other side of the street.",
        "A cheetah is chasing its prey.",
        "Word.",
    ]
    expected = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    bertfast.patch(model)
    got = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    assert (got @ got.T - expected @ expected.T).abs().max() <= 1e-6


@pytest.mark.parametrize("family", PREFIXES)
def test_models_of_other_families_give_the_same(family, tmp_path):
    texts = ["the film was good", "a bad film", "what", "the plot of the film and the music"]
    folder = write_model(family, tmp_path / "model", texts * 10)
    transformer = modules.Transformer(str(folder))
    model = st.SentenceTransformer(modules=[transformer, modules.Pooling(64, "mean")], device="cpu")
    expected = model.encode(texts, convert_to_tensor=True)
    assert not bertfast.patch(model).left
    torch.testing.assert_close(model.encode(texts, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    reranker = st.CrossEncoder(str(folder), num_labels=1, device="cpu")
    pairs = [("what film", text) for text in texts]
    expected = reranker.predict(pairs, convert_to_tensor=True)
    assert not bertfast.patch(reranker.model).left
    torch.testing.assert_close(reranker.predict(pairs, convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)
