"""The object that mteb takes as a model, against its documented protocol and sentence-transformers."""

import enum
import inspect
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytest
import torch
from text_pairs import rows_of, write_pairs
from torch.utils.data import DataLoader

from bertfast.cli.main import main
from bertfast.inference.text_encoder import TextEncoder

TEXTS = ["the film was good", "bad", "a very bad plot and a good actor", "", "music with a plot"]
PROMPTS = {"query": "a film ", "passage": "the ", "STS12": "bad "}
PROMPTS |= {"Retrieval-query": "music ", "NFCorpus-query": "good "}


@runtime_checkable
class EncoderProtocol(Protocol):
    """The members of mteb's protocol of this name, version 2."""

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **kwargs): ...

    def similarity(self, embeddings1, embeddings2): ...

    def similarity_pairwise(self, embeddings1, embeddings2): ...

    @property
    def mteb_model_meta(self): ...


class PromptType(enum.StrEnum):
    """As in mteb 2; before, a document was a passage."""

    query = "query"
    document = "document"


def open_encoder(model, **settings) -> TextEncoder:
    return TextEncoder(str(model), device="cpu", **{"precision": "fp32"} | settings)


def task(name: str, kind: str) -> Any:
    return SimpleNamespace(name=name, type=kind)


@pytest.fixture(scope="module")
def prompted(pretrained, tmp_path_factory):
    """A model of sentence-transformers with prompts, and its folder."""
    st = pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("prompted")
    model = st.SentenceTransformer(str(pretrained), device="cpu", prompts=PROMPTS, similarity_fn_name="dot")
    model.save(str(folder))
    return model, folder


def test_it_has_the_members_of_the_protocol(pretrained):
    encoder = open_encoder(pretrained)
    assert isinstance(encoder, EncoderProtocol)
    assert encoder.mteb_model_meta is None
    encoder.mteb_model_meta = "meta"
    for name in ("encode", "similarity", "similarity_pairwise"):
        expected = inspect.signature(getattr(EncoderProtocol, name)).parameters.values()
        found = inspect.signature(getattr(TextEncoder, name)).parameters
        assert all(found[x.name].kind == x.kind for x in expected if x.kind != x.VAR_KEYWORD), name


def test_batches_of_a_loader_are_embedded_as_by_sentence_transformers(pretrained, monkeypatch):
    st = pytest.importorskip("sentence_transformers")
    monkeypatch.setattr("bertfast.inference.text_encoder._TEXTS", 2)
    model, encoder = st.SentenceTransformer(str(pretrained), device="cpu"), open_encoder(pretrained)
    loader = DataLoader([{"text": text, "id": str(i)} for i, text in enumerate(TEXTS)], batch_size=3)
    options = {"task_metadata": task("STS12", "STS"), "hf_split": "test", "hf_subset": "default", "batch_size": 3}
    found = encoder.encode(loader, **options)
    expected = model.encode(TEXTS)
    np.testing.assert_allclose(found, expected, atol=1e-5, rtol=1e-4)
    assert found.dtype == np.float32
    assert np.array_equal(found, encoder.encode(TEXTS, task_name="STS12"))  # as mteb 1 calls it
    assert encoder.encode([]).shape == (0, 32)
    for name in ("similarity", "similarity_pairwise"):
        values = getattr(encoder, name)(found, torch.from_numpy(expected[::-1].copy()))
        torch.testing.assert_close(values, getattr(model, name)(expected, expected[::-1].copy()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("metadata", "kind", "name"),
    [
        (task("NFCorpus", "Retrieval"), PromptType.query, "NFCorpus-query"),
        (task("SciFact", "Retrieval"), PromptType.query, "Retrieval-query"),
        (task("STS12", "STS"), None, "STS12"),
        (task("STS12", "STS"), PromptType.query, "STS12"),
        (task("ArguAna", "Other"), PromptType.query, "query"),
        (task("ArguAna", "Other"), PromptType.document, "passage"),
        (task("ArguAna", "Other"), "passage", "passage"),
        (task("ArguAna", "Other"), None, None),
    ],
)
def test_prompts_are_chosen_as_mteb_documents_it(metadata, kind, name, prompted):
    model, folder = prompted
    encoder = open_encoder(folder)
    options = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    found = encoder.encode(TEXTS, prompt_type=kind, **options)
    np.testing.assert_allclose(found, model.encode(TEXTS, prompt_name=name), atol=1e-5, rtol=1e-4)
    if name is not None:
        assert np.array_equal(found, encoder.encode(TEXTS, prompt_name=name))
        assert not np.allclose(found, encoder.encode(TEXTS))


def test_the_similarity_is_that_of_the_model(prompted):
    model, folder = prompted
    encoder = open_encoder(folder)
    vectors = encoder.encode(TEXTS)
    expected = model.similarity(vectors, vectors)
    torch.testing.assert_close(encoder.similarity(vectors, vectors), expected, rtol=1e-4, atol=1e-4)
    assert encoder.similarity(vectors[0], vectors).shape == (1, 5)


def test_a_task_of_scored_pairs_has_the_correlation_that_evaluate_prints(pretrained, tmp_path, capsys):
    from scipy.stats import spearmanr

    file, rows = write_pairs(tmp_path / "a.tsv", "scored", 40), rows_of("scored", 40, 0)
    encoder = open_encoder(pretrained)
    first, second = (encoder.encode(DataLoader([{"text": row[i]} for row in rows], batch_size=8)) for i in (0, 1))
    expected = spearmanr(encoder.similarity_pairwise(first, second), [float(row[2]) for row in rows]).statistic
    arguments = ["--model-name-or-path", str(pretrained), "--validation-file", str(file), "--device", "cpu"]
    capsys.readouterr()
    assert main(["evaluate", "--task", "embedding", *arguments, "--precision", "fp32"]) == 0
    printed = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(printed["eval_spearmanr"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        ("a text", {}, "inputs must be a list of texts, got one text: put it in a list"),
        ([{"image": [1]}], {}, "each batch must have texts under 'text', and has image: other modalities are"),
        ([3], {}, "each batch must have texts under 'text', but is of type int:"),
        (["a"], {"prompt_name": "x"}, "prompt_name 'x': .* has no prompts"),
        (
            [{"text": ["a", "b"]}, "\ud83d"],
            {},
            r"text 3: unpaired surrogate \\ud83d, which is not a character: replace",
        ),
    ],
)
def test_inputs_without_texts_are_refused(inputs, options, message, pretrained):
    with pytest.raises(ValueError, match=message):
        open_encoder(pretrained).encode(inputs, **options)


def test_a_prompt_of_bytes_that_are_no_text_is_refused(pretrained):
    with pytest.raises(ValueError, match=r"--prompt: unpaired surrogate \\udcff, which is not a character: write the"):
        open_encoder(pretrained, prompt="a \udcff")


def test_models_that_cannot_be_compared_are_refused(pretrained, tmp_path):
    st = pytest.importorskip("sentence_transformers")
    st.SentenceTransformer(str(pretrained), device="cpu", similarity_fn_name="manhattan").save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="has the similarity_fn_name 'manhattan'; only cosine and dot are supported"):
        open_encoder(tmp_path / "model")
    with pytest.raises(ValueError, match="pooling must not be 'none'"):
        open_encoder(pretrained, pooling="none")
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_encoder(tmp_path / "nothing")
