"""mteb runs tasks offline, with data in memory, on `TextEncoder`; skipped where mteb is not installed."""

from pathlib import Path
from typing import Any

import pytest
from text_pairs import rows_of

from bertfast.inference.text_encoder import TextEncoder

pytestmark = pytest.mark.slow

PROMPTS = {"query": "a film ", "document": "the "}


def tasks() -> list[Any]:
    """Return a task of similarity and one of retrieval, with texts that no other task has."""
    from datasets import Dataset, DatasetDict
    from mteb.abstasks import AbsTaskRetrieval, AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata

    def described(kind: str, score: str) -> TaskMetadata:
        return TaskMetadata(
            name=f"Words{kind}",
            description="Texts are similar if they consist of the same words.",
            type=kind,
            dataset={"path": "none", "revision": "none"},
            eval_langs=["eng-Latn"],
            main_score=score,
        )

    class Similarity(AbsTaskSTS):
        metadata = described("STS", "cosine_spearman")

        def load_data(self, num_proc: int | None = None, **others: Any) -> None:
            first, second, scores = zip(*rows_of("scored", 30, seed=0), strict=True)
            columns = {"sentence1": first, "sentence2": second, "score": [*map(float, scores)]}
            self.dataset = DatasetDict({"test": Dataset.from_dict({name: [*x] for name, x in columns.items()})})
            self.data_loaded = True

    class Retrieval(AbsTaskRetrieval):
        metadata = described("Retrieval", "ndcg_at_10")

        def load_data(self, num_proc: int | None = None, **others: Any) -> None:
            pairs = rows_of("pairs", 30, seed=0)
            queries, corpus = (
                Dataset.from_list([{"id": f"{kind}{i}", "text": pair[column]} for i, pair in enumerate(pairs)])
                for column, kind in enumerate("qd")
            )
            relevant = {f"q{i}": {f"d{i}": 1} for i in range(len(pairs))}
            split = {"queries": queries, "corpus": corpus, "relevant_docs": relevant, "top_ranked": None}
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return [Similarity(), Retrieval()]


def scores_of(model: Any) -> dict[str, float]:
    import mteb

    results = mteb.evaluate(model, tasks(), cache=None, show_progress_bar=False).task_results
    return {result.task_name: result.get_score() for result in results}


def test_scores_are_those_of_the_same_model_in_sentence_transformers(pretrained, tmp_path, monkeypatch):
    pytest.importorskip("mteb")
    st = pytest.importorskip("sentence_transformers")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    folder: Path = tmp_path / "model"
    st.SentenceTransformer(str(pretrained), device="cpu", prompts=PROMPTS).save(str(folder))
    found = scores_of(TextEncoder(str(folder), device="cpu", precision="fp32"))
    assert found == pytest.approx(scores_of(st.SentenceTransformer(str(folder), device="cpu")), abs=1e-5)
    assert found["WordsSTS"] > 0.3
    unprompted = tmp_path / "unprompted"
    st.SentenceTransformer(str(pretrained), device="cpu").save(str(unprompted))
    others = scores_of(TextEncoder(str(unprompted), device="cpu", precision="fp32"))
    assert others["WordsRetrieval"] != found["WordsRetrieval"]  # the prompts are used
