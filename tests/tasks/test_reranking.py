"""Pairs and lists of documents to rerank: reading, metrics and messages."""

import json

import numpy as np
import pytest

from bertfast.tasks.registry import choose_task
from bertfast.tasks.reranking import RerankingTask
from bertfast.tasks.settings import TaskSettings


def task(**changes) -> RerankingTask:
    return choose_task(TaskSettings.of(model_name_or_path="model", task="reranking", **changes))


def write(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "documents", "labels"),
    [
        ({"query": "q", "passage": "a", "label": "1"}, "a", [1.0]),
        ({"sentence1": "q", "sentence2": "a", "score": 0.25}, "a", [0.25]),
        ({"anchor": "q", "positive": "a", "negative": "b"}, "ab", [1.0, 0.0]),
        ({"query": "q", "positive": ["a", "b"], "negatives": ["c"]}, "abc", [1.0, 1.0, 0.0]),
        ({"query": "q", "pos": ["a"], "neg": ["b", "c"]}, "abc", [1.0, 0.0, 0.0]),
        ({"query": "q", "docs": ["a", "b"], "labels": [0, 1]}, "ab", [0.0, 1.0]),
    ],
)
def test_pairs_and_lists_are_read(row, documents, labels, tmp_path):
    pairs = [("q", document) for document in documents]
    found = task().read(write(tmp_path / "a.jsonl", row, row), labelled=True)
    assert found.pairs == pairs * 2
    assert found.labels == labels * 2
    assert found.sizes == [len(pairs)] * 2
    assert found.lists == (len(pairs) > 1)
    assert task().read(write(tmp_path / "a.jsonl", row), labelled=False).pairs == pairs


def test_a_table_of_triplets_is_read(tmp_path):
    (tmp_path / "a.tsv").write_text("anchor\tpositive\tnegative\nq\ta\tb\n")
    found = task().read(str(tmp_path / "a.tsv"), labelled=True)
    assert (found.pairs, found.labels) == ([("q", "a"), ("q", "b")], [1.0, 0.0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "a", "label": 1}, r"a\.jsonl has no columns query, document and label; .*--text-column and --te"),
        ({"query": "a", "label": 1}, r"has no columns query, document and label; .*--text-pair-column"),
        ({"query": "q", "passage": "a"}, r"has no column 'label'"),
        ({"query": "q", "passage": "a", "label": "x"}, r"line 1: the label 'x' in column 'label' is not a finite num"),
        ({"query": None, "passage": "a", "label": 1}, r"line 1: column 'query' is null or missing"),
        ({"query": "q", "positive": [], "negative": ["a"]}, r"line 1: column 'positive' is missing or empty"),
        ({"query": "q", "positive": ["a", 3]}, r'line 1: column .positive. holds \["a", 3\], not a text or a list'),
        ({"query": "q", "positive": "a", "negative": 3}, r"line 1: column 'negative' holds 3, not a text or a list"),
        ({"query": "q", "docs": ["a", "b"], "labels": [1]}, r"line 1: 1 number in column 'labels' and 2 documents"),
        ({"query": "q", "docs": ["a"], "labels": ["x"]}, r'line 1: column .labels. holds \["x"\], not a list of num'),
        ({"query": "q", "docs": ["a"], "labels": None}, r"line 1: column 'labels' holds null, not a list of numbers"),
        ({"query": "q", "docs": [3], "labels": [1]}, r"line 1: column 'docs' holds \[3\], not a list of texts"),
        (
            {"query": "q", "docs": ["a"], "labels": [np.nan]},
            r"line 1: the label nan in column 'labels' is not a finite",
        ),
        (
            {"query": "q", "docs": ["a"], "labels": [-np.inf]},
            r"line 1: the label -inf in column 'labels' is not a fini",
        ),
        (
            {"query": "q", "docs": ["a"], "labels": [10**60]},
            r"line 1: the label 10+ in column 'labels' is not a finite",
        ),
        ({"query": "q", "passage": "a", "label": np.nan}, r"line 1: the label nan in column 'label' is not a finite"),
        ({"query": " ", "passage": "a", "label": 1}, r"line 1: column 'query' holds a blank text"),
        ({"query": "q", "passage": "", "label": 1}, r"line 1: column 'passage' holds a blank text"),
        ({"query": "q", "positive": ["a", ""]}, r"line 1: column 'positive' holds a blank text"),
        ({"query": "q", "positive": "a", "negative": " "}, r"line 1: column 'negative' holds a blank text"),
        ({"query": "q", "docs": ["a", "\t"], "labels": [1, 0]}, r"line 1: column 'docs' holds a blank text"),
        ({"query": "q", "docs": ["a"]}, r"has the column 'docs' of lists, and no column 'labels' of as many labels"),
    ],
)
def test_unusable_rows_are_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        task().read(write(tmp_path / "a.jsonl", row), labelled=True)


def test_rows_are_skipped_on_request_and_outputs_stay_aligned(tmp_path):
    rows = [{"query": "q", "positive": ["a"], "negative": ["b"]}, {"query": "q", "positive": 3}]
    rows += [{"query": "r", "positive": ["c"], "negative": []}]
    reader = task(on_bad_rows="skip")
    found = reader.read(write(tmp_path / "a.jsonl", *rows), labelled=True)
    assert (found.sizes, found.rows.numbers) == ([2, 1], [1, 3])
    logits = (0.0, 2.0, -1.0)
    outputs, sigmoid = [np.array([x]) for x in logits], [1 / (1 + np.exp(-x)) for x in logits]
    predictions = [*reader.predictions(found, None, outputs)]
    assert predictions == [{"scores": pytest.approx(sigmoid[:2])}, {"scores": pytest.approx(sigmoid[2:])}]
    reader.write_predictions(tmp_path, "test", found, None, outputs)
    lines = [line.split("\t")[:2] for line in (tmp_path / "predictions_test.tsv").read_text().splitlines()]
    assert lines == [["row", "score"], ["1", "0.5,0.880797"], ["2", ""], ["3", "0.268941"]]


def test_the_first_row_with_a_blank_text_is_named(tmp_path):
    (tmp_path / "a.tsv").write_text("query\tdocument\tlabel\nq\t\t1\n\td\t0\n")
    with pytest.raises(ValueError, match="line 2: column 'document' holds a blank text"):
        task().read(str(tmp_path / "a.tsv"), labelled=True)


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        (
            [0, 5],
            {},
            r"line 2: the label 5 is not from 0 to 1: give the largest label of the file, as in --max-score 5",
        ),
        ([1, 1], {}, r"every label is 1; reranking needs different labels"),
    ],
)
def test_labels_that_cannot_be_trained_are_named(labels, changes, message, tmp_path):
    reader = task(**changes)
    rows = [{"query": "q", "passage": "a", "label": label} for label in labels]
    pairs = reader.read(write(tmp_path / "a.jsonl", *rows), labelled=True)
    with pytest.raises(ValueError, match=message):
        reader.label_config(pairs)


@pytest.mark.parametrize("lists", [False, True])
def test_rows_with_a_negative_label_are_named_or_skipped(lists, tmp_path):
    rows = [{"query": "q", "docs": ["a", "b"], "labels": [label, 0]} for label in (1, -1, 0)]
    if not lists:
        rows = [{"query": "q", "passage": "a", "label": label} for label in (1, -1, 0)]
    file = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(ValueError, match="line 2: the label -1 is negative: write 0 for a document that does not"):
        task().read(file, labelled=True)
    assert task(on_bad_rows="skip").read(file, labelled=True).rows.numbers == [1, 3]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([("q", 1), ("r", 1)], "every label is 1"),
        ([("q", 0), ("q", 0), ("r", 0)], "every label is 0"),
        ([("q", 0.5), ("r", 0.5)], "every label is 0.5"),
        ([("q", 0), ("r", 1)], None),  # by correlation
        ([("q", 0), ("q", 1)], None),
    ],
)
def test_labels_that_cannot_be_measured_are_named(rows, reason, tmp_path):
    reader = task()
    entries = [{"query": query, "passage": f"{i}", "label": label} for i, (query, label) in enumerate(rows)]
    pairs = reader.read(write(tmp_path / "a.jsonl", *entries), labelled=True)
    assert reader.unmeasurable(pairs, None) == ({} if reason is None else dict.fromkeys(reader.metrics, reason))
    found = reader.measure(pairs, None, [np.array([float(i)]) for i in range(len(rows))])
    assert {*found} == (set() if reason else {*reader.metrics})


def test_the_first_pairs_of_a_file_may_have_nothing_to_rank(tmp_path):
    reader = task()
    entries = [{"query": "q", "passage": f"{i}", "label": i % 2} for i in range(4)]
    pairs = reader.read(write(tmp_path / "a.jsonl", *entries), labelled=True)
    assert reader.metrics[0] == "ndcg_at_10"
    assert {*reader.unmeasurable(pairs.select([0, 2]), None).values()} == {"every label is 0"}


def test_equal_scores_have_no_correlation(tmp_path, caplog):
    reader = task()
    entries = [{"query": f"{i}", "passage": "a", "label": i % 2} for i in range(4)]
    pairs = reader.read(write(tmp_path / "a.jsonl", *entries), labelled=True)
    for _ in range(2):
        assert reader.measure(pairs, None, [np.zeros(1)] * 4) == {}
    assert caplog.text.count("all predictions are equal, so spearmanr, pearson cannot be measured") == 1


def test_a_largest_label_is_refused_where_columns_are_the_labels(tmp_path):
    file = write(tmp_path / "a.jsonl", {"query": "q", "positive": "a", "negative": "b"})
    with pytest.raises(
        ValueError, match=r"--max-score would have no effect: .* has no labels, but the columns 'positive'"
    ):
        task(max_score=5.0).read(file, labelled=True)


def test_flags_of_embeddings_have_no_effect():
    with pytest.raises(ValueError, match="--loss would have no effect: the task is reranking"):
        task(loss="cosent")


def test_lines_of_standard_input_are_pairs():
    assert task().parse_lines(["q\ta"]).pairs == [("q", "a")]
    with pytest.raises(ValueError, match="line 1: one text: give a query and a document, separated by a tab"):
        task().parse_lines(["q"])


def test_documents_of_equal_queries_are_ranked_together(tmp_path):
    rows = [("q", 0), ("q", 1), ("r", 1), ("q", 1), ("s", 0), ("s", 0)]
    reader = task()
    entries = [{"query": query, "passage": f"{i}", "label": label} for i, (query, label) in enumerate(rows)]
    pairs = reader.read(write(tmp_path / "a.jsonl", *entries), labelled=True)
    assert reader.metrics == ("ndcg_at_10", "mrr_at_10", "accuracy_at_1")
    found = reader.compute_metrics(pairs, None, [np.array([x]) for x in (3.0, 2.0, 0.0, 1.0, 5.0, 4.0)])
    # q: irrelevant, relevant, relevant; r: relevant; s has nothing to find
    gain = (1 / np.log2(3) + 1 / np.log2(4)) / (1 + 1 / np.log2(3))
    assert found == pytest.approx({"ndcg_at_10": (gain + 1) / 2, "mrr_at_10": 0.75, "accuracy_at_1": 0.5})
    constant = reader.compute_metrics(pairs, None, [np.zeros(1)] * 6)
    assert constant["accuracy_at_1"] == 0.5  # r has one document only


@pytest.mark.parametrize("labels", [[1, np.nan], [1], ["x", "y"], None])
def test_documents_without_usable_labels_can_be_predicted(labels, tmp_path, caplog):
    rows = [{"query": "q", "docs": ["a", "b"], "labels": values} for values in ([1, 0], labels)]
    found = task().read(write(tmp_path / "a.jsonl", *rows), labelled=False)
    assert (len(found), found.labels) == (4, None)
    assert "no metrics of" in caplog.text
