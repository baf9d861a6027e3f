"""Pairs and triplets: reading, and losses and metrics equal to those of sentence-transformers."""

import json

import numpy as np
import pytest
import torch
from parity import assert_as_accurate_as_torch
from torch import nn

from bertfast.tasks.embedding import EmbeddingTask
from bertfast.tasks.embedding_losses import embedding_loss
from bertfast.tasks.metrics import ranking_metrics, retrieval_metrics
from bertfast.tasks.registry import choose_task
from bertfast.tasks.settings import EmbeddingSettings, TaskSettings

EXAMPLES, SIZE = 9, 24


def task(**changes) -> EmbeddingTask:
    return choose_task(TaskSettings.of(model_name_or_path="model", task="embedding", **changes))


def vectors(count: int, dtype=torch.float32) -> torch.Tensor:
    """Return [EXAMPLES, count, SIZE]; later texts resemble the first."""
    values = torch.randn(EXAMPLES, count, SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[:, 1] += values[:, 0]
    return values.to(dtype)


class Columns(nn.Module):
    """Stands for a SentenceTransformer: its inputs are embeddings already."""

    def forward(self, features: dict) -> dict:
        return dict(features)

    def get_embedding_dimension(self) -> int:
        return SIZE


def st_loss(name: str, values: torch.Tensor, labels: torch.Tensor, settings: EmbeddingSettings) -> torch.Tensor:
    """Return the loss of sentence-transformers."""
    losses = pytest.importorskip("sentence_transformers.losses")
    model = Columns()
    loss = {
        "multiple-negatives-ranking": lambda: losses.MultipleNegativesRankingLoss(model, settings.similarity_scale),
        "cosent": lambda: losses.CoSENTLoss(model, settings.similarity_scale),
        "contrastive": lambda: losses.ContrastiveLoss(model, margin=settings.contrastive_margin),
    }[name]()
    if settings.matryoshka_dims:
        loss = losses.MatryoshkaLoss(model, loss, settings.matryoshka_dims)
    return loss([{"sentence_embedding": column} for column in values.unbind(1)], labels)


@pytest.mark.parametrize("dims", [[], [24, 8, 16]])
@pytest.mark.parametrize(
    ("name", "count", "options"),
    [
        ("multiple-negatives-ranking", 2, {}),
        ("multiple-negatives-ranking", 4, {"similarity_scale": 7.5}),
        ("cosent", 2, {}),
        ("cosent", 2, {"similarity_scale": 3.0}),
        ("contrastive", 2, {}),
        ("contrastive", 2, {"contrastive_margin": 0.9}),
    ],
)
def test_losses_and_their_gradients_are_those_of_sentence_transformers(name, count, options, dims):
    settings = EmbeddingSettings(matryoshka_dims=dims, **options)
    labels = torch.tensor([1.0, 0, 0, 1, 1, 0, 1, 0, 0] if name == "contrastive" else [3.0, 1, 4, 1, 5, 9, 2.5, 6, 5])
    ids = torch.arange(EXAMPLES * count).view(EXAMPLES, count)

    def bertfast_loss(values, labels):
        return embedding_loss(name, values, labels, ids, settings)

    def expected_loss(values, labels):
        return st_loss(name, values, labels, settings)

    results = []
    for function, dtype in (
        (bertfast_loss, torch.float32),
        (expected_loss, torch.float32),
        (expected_loss, torch.float64),
    ):
        values = vectors(count, dtype).requires_grad_()
        loss = function(values, labels.to(dtype))
        results.append((loss, torch.autograd.grad(loss, values)[0]))
    for which, what in enumerate(("loss", "gradient")):
        assert_as_accurate_as_torch(*(result[which] for result in results), name=what)


def test_equal_texts_are_no_negatives_of_each_other():
    settings = EmbeddingSettings()
    values = vectors(2)[:4]
    values[3, 1] = values[0, 1]  # the positive of example 3 is that of example 0
    values[2, 0] = values[1, 0]  # and the anchor of example 2 that of example 1
    ids = torch.tensor([[0, 1], [2, 3], [2, 4], [5, 1]])
    found = embedding_loss("multiple-negatives-ranking", values, torch.zeros(4), ids, settings)
    directions = nn.functional.normalize(values, dim=-1)
    logits = 20 * directions[:, 0] @ directions[:, 1].T
    terms = []
    for row, negatives in enumerate([[1, 2], [0, 3], [0, 3], [1, 2]]):
        terms.append(logits[row, [row, *negatives]].logsumexp(0) - logits[row, row])
    torch.testing.assert_close(found, torch.stack(terms).mean())


def write(path, rows) -> str:
    header = [*rows[0]]
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("\n".join("\t".join(map(str, row)) for row in (header, *(row.values() for row in rows))) + "\n")
    return str(path)


@pytest.mark.parametrize("suffix", [".tsv", ".jsonl"])
@pytest.mark.parametrize(
    ("row", "texts", "score"),
    [
        ({"anchor": "a", "positive": "b"}, ("a", "b"), None),
        ({"negative": "c", "positive": "b", "anchor": "a"}, ("a", "b", "c"), None),
        ({"query": "a", "answer": "b", "negative_1": "c", "negative_2": "d"}, ("a", "b", "c", "d"), None),
        ({"sentence1": "a", "sentence2": "b", "score": "2.5"}, ("a", "b"), 2.5),
        ({"anchor": "a", "positive": "b", "label": "1"}, ("a", "b"), 1.0),
        ({"qid1": "7", "question1": "a", "question2": "b", "is_duplicate": "0"}, ("a", "b"), 0.0),  # QQP
        ({"genre": "x", "sentence2": "b", "sentence1": "a", "score": "5.000"}, ("a", "b"), 5.0),  # STS-B
    ],
)
def test_columns_of_the_examples_of_sentence_transformers(suffix, row, texts, score, tmp_path):
    groups = task().read(write(tmp_path / f"a{suffix}", [row, row]), labelled=True)
    assert groups.texts == [texts, texts]
    assert groups.scores == (None if score is None else [score, score])


@pytest.mark.parametrize(
    ("line", "texts"),
    [
        (["a", "b"], ("a", "b")),
        (["a", "b", "c"], ("a", "b", "c")),
        ({"query": "a", "pos": ["b"], "neg": ["c", "d"]}, ("a", "b", "c", "d")),
        ({"anchor": "a", "positive": "b", "negatives": ["c"]}, ("a", "b", "c")),
    ],
)
def test_lists_of_texts_in_lines_of_json(line, texts, tmp_path):
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(line)}\n" * 2)
    assert task().read(str(tmp_path / "a.jsonl"), labelled=True).texts == [texts, texts]


def test_lines_of_lists_tell_the_task(tmp_path):
    (tmp_path / "a.jsonl").write_text('["a", "b"]\n["c", "d"]\n')
    settings = TaskSettings.of(model_name_or_path="model")
    assert isinstance(choose_task(settings, file=str(tmp_path / "a.jsonl")), EmbeddingTask)
    (tmp_path / "a.jsonl").write_text('["a", 3]\n')
    with pytest.raises(ValueError, match=r"line 1: neither a list of two or more texts, like .*, nor an object like"):
        task().read(str(tmp_path / "a.jsonl"), labelled=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["e", "f", "g"], "line 2: 1 negative where other rows have 0: give as many in each row"),
        (["e"], "line 2: neither a list of two or more texts, like"),
        (["e", ["f"]], "line 2: neither a list of two or more texts, like"),
        (["e", "\ud800"], r"line 2: unpaired surrogate \\ud800"),
    ],
)
def test_the_bad_line_of_lists_of_texts_is_named(bad, message, tmp_path):
    rows = [["a", "b"], bad, ["c", "d"]]
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        task().read(str(file), labelled=True)
    found = task(on_bad_rows="skip").read(str(file), labelled=True)
    assert (found.texts, found.rows.numbers) == ([("a", "b"), ("c", "d")], [1, 3])


def test_rows_with_a_blank_text_are_skipped_on_request(tmp_path):
    (tmp_path / "a.tsv").write_text("anchor\tpositive\na\tb\n\tc\nd\t \ne\tf\n")
    reader = task(on_bad_rows="skip")
    groups = reader.read(str(tmp_path / "a.tsv"), labelled=True)
    assert (groups.texts, groups.rows.numbers, reader.bad_rows.count) == ([("a", "b"), ("e", "f")], [1, 4], 2)
    (tmp_path / "b.tsv").write_text("anchor\tpositive\na\t\n")
    with pytest.raises(ValueError, match=r"b\.tsv has no usable rows"):
        reader.read(str(tmp_path / "b.tsv"), labelled=True)


def test_one_column_is_not_both_texts():
    with pytest.raises(ValueError, match="--text-column and --text-pair-column both name 'x': name another column"):
        task(text_column="x", text_pair_column="x")


PAIRS_WITHOUT_NEGATIVES = [[("a", "b")], [("a", "b")] * 3, [("a", "b"), ("a", "c")], [("a", "b"), ("c", "b")]]


@pytest.mark.parametrize("pairs", PAIRS_WITHOUT_NEGATIVES)
def test_pairs_without_negatives_are_neither_trained_nor_measured(pairs, tmp_path):
    reader = task()
    rows = [{"anchor": anchor, "positive": positive} for anchor, positive in pairs]
    groups = reader.read(write(tmp_path / "a.tsv", rows), labelled=True)
    with pytest.raises(
        ValueError, match=r"a\.tsv: no pair has a negative, as all have the same anchor or the same pos"
    ):
        reader.label_config(groups)
    reason = "no anchor has another text to find than its positives"
    assert reader.unmeasurable(groups, None) == dict.fromkeys(reader.metrics, reason)
    groups = reader.read(write(tmp_path / "a.tsv", [row | {"negative": "x"} for row in rows]), labelled=True)
    assert reader.label_config(groups)
    assert reader.unmeasurable(groups, None) == {}


def test_equal_scores_are_not_measured(tmp_path):
    reader = task(matryoshka_dims=[8])
    rows = [{"sentence1": "a", "sentence2": "b", "score": 0.5}, {"sentence1": "c", "sentence2": "d", "score": 0.5}]
    groups = reader.read(write(tmp_path / "a.jsonl", rows), labelled=True)
    names = ("spearmanr", "pearson", "spearmanr_8", "pearson_8")
    assert reader.unmeasurable(groups, None) == dict.fromkeys(names, "every score is 0.5")


def test_columns_can_be_named(tmp_path):
    file = write(tmp_path / "a.tsv", [{"x": "a", "score": "9", "y": "b", "z": "3"}])
    named = task(text_column="y", text_pair_column="x", label_column="z").read(file, labelled=True)
    assert (named.texts, named.scores) == ([("b", "a")], [3.0])


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([{"sentence": "a", "label": "1"}], {}, r"a\.jsonl has no columns anchor and positive, .*--text-pair-column"),
        ([{"anchor": "a", "positive": None}], {}, r"line 1: column 'positive' is null or missing"),
        ([{"anchor": " ", "positive": "b"}], {}, r"line 1: column 'anchor' holds a blank text"),
        ([{"anchor": "a", "positive": ""}], {}, r"line 1: column 'positive' holds a blank text"),
        ([{"query": "a", "pos": ["b", "c"]}], {}, r"line 1: column 'pos' holds 2 texts: write a row for each positive"),
        ([{"query": "a", "pos": "b", "neg": ["c", 3]}], {}, r"""column 'neg' holds \["c", 3\], not a text"""),
        (
            [{"query": "a", "pos": "b", "neg": ["c", "d"]}, {"query": "a", "pos": "b", "neg": ["c"]}],
            {},
            r"line 2: 1 negative where other rows have 2: give as many in each row",
        ),
        (
            [{"anchor": "a", "positive": "b"}],
            {"text_pair_column": "anchor"},
            r"the column 'anchor' would be both texts of a pair: name another one",
        ),
        (
            [{"sentence1": "a", "sentence2": "b", "score": "x"}],
            {},
            r"line 1: the score 'x' in column 'score' is not a fin",
        ),
        (
            [{"sentence1": "a", "sentence2": "b", "score": None}],
            {},
            r"line 1: the score None in column 'score' is not a",
        ),
        ([{"anchor": "a", "positive": "b"}], {"label_column": "stars"}, r"has no column 'stars'"),
        (
            [{"anchor": "a", "positive": "b", "negative": "c", "label": 1}],
            {"label_column": "label"},
            r"has the column 'negative', and examples with negatives have no scores: leave --label-column out",
        ),
    ],
)
def test_unusable_rows_are_named(rows, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        task(**changes).read(write(tmp_path / "a.jsonl", rows), labelled=True)


def test_rows_without_a_score_are_skipped_on_request(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in ("1", "", "2")]
    reader = task(on_bad_rows="skip")
    groups = reader.read(write(tmp_path / "a.jsonl", rows), labelled=True)
    assert (groups.scores, groups.rows.numbers, reader.bad_rows.count) == ([1.0, 2.0], [1, 3], 1)


@pytest.mark.parametrize(
    ("scores", "loss", "expected"),
    [
        (None, "auto", "multiple-negatives-ranking"),
        ([0, 1], "auto", "contrastive"),
        ([0, 1, 2], "auto", "cosent"),
        ([0, 1], "cosent", "cosent"),
        ([0, 1], "contrastive", "contrastive"),
        (None, "cosent", "has no scores, which --loss cosent needs: add a column score"),
        (None, "contrastive", "has no scores, which --loss contrastive needs: add a column score"),
        ([0, 1], "multiple-negatives-ranking", "has scores, which --loss multiple-negatives-ranking cannot use"),
        ([0, 0.5], "contrastive", "has the score 0.5, and --loss contrastive needs 0 or 1"),
        ([3, 3], "auto", "every score is 3; embeddings need pairs with different scores"),
    ],
)
def test_the_loss_fits_the_file(scores, loss, expected, tmp_path):
    row, other = {"sentence1": "a", "sentence2": "b"}, {"sentence1": "c", "sentence2": "d"}
    rows = [row, other] if scores is None else [row | {"score": score} for score in scores]
    chosen = task(loss=loss)
    groups = chosen.read(write(tmp_path / "a.jsonl", rows), labelled=True)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            chosen.label_config(groups)
    else:
        assert chosen.label_config(groups) == {"finetuning_task": "embedding"}
        assert chosen.loss_name == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"similarity_scale": 5.0}, "--similarity-scale would have no effect: the loss is contrastive"),
        ({"loss": "cosent", "contrastive_margin": 0.1}, "--contrastive-margin would have no effect: --loss cosent has"),
        (
            {"loss": "contrastive", "similarity_scale": 1.0},
            "--similarity-scale would have no effect: --loss contrastive",
        ),
        ({"matryoshka_dims": [8, 8]}, "--matryoshka-dims has 8 more than once"),
        ({"loss": "x"}, "--loss must be auto, multiple-negatives-ranking, cosent or contrastive, got 'x'"),
        ({"doc_stride": 3}, "--doc-stride would have no effect: the task is embedding"),
    ],
)
def test_flags_without_effect_are_refused(flags, message, tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "score": score} for score in (0, 1)]
    file = write(tmp_path / "a.jsonl", rows)

    def choose() -> None:
        chosen = task(**flags)
        chosen.label_config(chosen.read(file, labelled=True))

    with pytest.raises(ValueError, match=message):
        choose()


@pytest.mark.parametrize("name", ["a.tsv", "a.jsonl"])
def test_anchors_and_positives_tell_the_task(name, tmp_path):
    file = write(tmp_path / name, [{"anchor": "a", "positive": "b"}])
    assert isinstance(choose_task(TaskSettings.of(model_name_or_path="model"), file=file), EmbeddingTask)


def test_flags_of_embeddings_are_refused_by_other_tasks():
    with pytest.raises(ValueError, match="--loss would have no effect: the task is sst-2"):
        choose_task(TaskSettings.of(model_name_or_path="model", task="sst-2", loss="cosent"))


def test_retrieval_is_measured_as_by_sentence_transformers():
    evaluation = pytest.importorskip("sentence_transformers.evaluation")
    generator = np.random.default_rng(0)
    embeddings = generator.standard_normal((60, 3, 8)).astype(np.float32)
    embeddings[:, 1] += 1.2 * embeddings[:, 0]
    ids = np.arange(180).reshape(60, 3)
    for row, other in ((1, 0), (2, 0), (30, 31)):  # equal anchors
        ids[row, 0], embeddings[row, 0] = ids[other, 0], embeddings[other, 0]
    for row, other in ((10, 11), (12, 11), (2, 0)):  # equal positives
        ids[row, 1], embeddings[row, 1] = ids[other, 1], embeddings[other, 1]
    ids[20, 2], embeddings[20, 2] = ids[21, 1], embeddings[21, 1]  # a negative that is a positive of another
    queries = {f"q{row[0]}": f"q{row[0]}" for row in ids}
    corpus = {f"d{i}": f"d{i}" for i in ids[:, 1:].ravel()}
    relevant: dict = {}
    for row in ids:
        relevant.setdefault(f"q{row[0]}", set()).add(f"d{row[1]}")
    known = {f"{'qdd'[column]}{ids[i, column]}": embeddings[i, column] for i in range(60) for column in range(3)}

    class Model:
        similarity_fn_name = "cosine"
        similarity = staticmethod(lambda a, b: torch.nn.functional.normalize(a) @ torch.nn.functional.normalize(b).T)

        def encode(self, texts):
            return torch.tensor(np.stack([known[text] for text in texts]))

    evaluator = evaluation.InformationRetrievalEvaluator(
        queries, corpus, relevant, score_functions={"cosine": Model.similarity}
    )
    evaluator.embed_inputs = lambda model, sentences, **options: model.encode(sentences)
    values = evaluator.compute_metrices(Model())["cosine"]
    found = retrieval_metrics(embeddings, ids, "a.tsv")
    assert found["ndcg_at_10"] == pytest.approx(values["ndcg@k"][10], abs=1e-9)
    assert found["mrr_at_10"] == pytest.approx(values["mrr@k"][10], abs=1e-9)
    assert found["accuracy_at_1"] == pytest.approx(values["accuracy@k"][1], abs=1e-9)
    assert 0.2 < found["ndcg_at_10"] < 0.95


def test_ranking_metrics_of_a_small_example():
    relevant = np.array([[False, True, False], [True, False, True], [False, False, False]])
    found = ranking_metrics(relevant, np.array([1, 3, 1]))
    second = (1 + 0.5) / (1 + 1 / np.log2(3) + 0.5)
    assert found["ndcg_at_10"] == pytest.approx((1 / np.log2(3) + second + 0) / 3)
    assert found["mrr_at_10"] == pytest.approx((0.5 + 1 + 0) / 3)
    assert found["accuracy_at_1"] == pytest.approx(1 / 3)


def test_pairs_on_standard_input_are_two_texts(tmp_path):
    reader = task()
    assert reader.parse_lines(["a\tb"]).texts == [("a", "b")]
    with pytest.raises(ValueError, match="line 1: one text: give two, or embed single texts with `bertfast embed`"):
        reader.parse_lines(["a"])
    with pytest.raises(ValueError, match="line 1: a blank text: give two"):
        reader.parse_lines(["a\t"])
