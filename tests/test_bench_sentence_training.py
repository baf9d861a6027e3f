"""The benchmarks of training embeddings and rerankers against sentence-transformers' trainers, and their rows."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from text_pairs import WORDS, rows_of

from bench.page import rows as page
from bertfast import BertConfig, BertForPreTraining
from bertfast.data.tokenizer import save_tokenizer, train_tokenizer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """The folder of a tiny model for sequences of 256 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer([" ".join(WORDS)] * 20, 256)
    sizes = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=tokenizer.get_vocab_size(), max_position_embeddings=256, **sizes)
    BertForPreTraining(config).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with files of STS-B and SQuAD in a small language."""
    folder = tmp_path_factory.mktemp("data")
    for seed, (split, squad) in enumerate({"train": "train-v1.1.subset", "dev": "dev-v1.1"}.items()):
        rows = [["sentence1", "sentence2", "score"], *rows_of("scored", 160, seed)]
        write(folder / f"glue/STS-B/{split}.tsv.gz", "".join("\t".join(row) + "\n" for row in rows))
        paragraphs = [
            {"context": f"{context} {context}", "qas": [{"question": question}]}
            for question, context in rows_of("pairs", 160, seed)
        ]
        write(folder / f"squad/{squad}.json.gz", json.dumps({"data": [{"paragraphs": paragraphs}]}))
    return folder


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))


@pytest.fixture
def table_row():
    """The function that makes the row of a result in docs/REPRODUCING.md."""
    pytest.importorskip("sentence_transformers")
    from bench.end_to_end.sentence_tasks import table_row

    return table_row


def run(program: str, model: Path, data: Path, results: Path, *options: str) -> subprocess.CompletedProcess:
    for package in ("accelerate", "datasets", "sentence_transformers"):
        pytest.importorskip(package)
    command = [sys.executable, "-m", f"bench.end_to_end.{program}", str(model), str(data), "--results", str(results)]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    ran = subprocess.run([*command, *options], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran


@pytest.mark.slow
def test_steps_of_both_sides_are_compared_and_timed(model, data, tmp_path):
    run("sentence_training", model, data, tmp_path, "--rounds=2", "--steps=1")
    result = json.loads((tmp_path / "sentence_training.json").read_text())
    for task in ("embedding", "reranking"):
        for precision, entry in result[task].items():
            assert len(entry["bertfast_s"]) == len(entry["sentence_transformers_s"]) == 2
            assert len(entry["losses"]["bertfast"]) == 5
            limit = 1e-4 if precision == "fp32" else 0.05
            assert entry["losses"]["bertfast"] == pytest.approx(entry["losses"]["sentence-transformers"], rel=limit)
            assert 0 < entry["lower_bound_s"] < entry["bertfast_s"][0]


@pytest.mark.slow
def test_both_sides_are_trained_and_measured_alike(model, data, table_row, tmp_path):
    ran = run("sentence_tasks", model, data, tmp_path, "--output", str(tmp_path / "runs"))
    for name in ("sts-b-embedding", "sts-b-reranking", "squad-retrieval"):
        result = json.loads((tmp_path / f"sentence_tasks-{name}.json").read_text())
        sides = [result[side] for side in ("bertfast", "sentence-transformers", "untrained") if side in result]
        assert len(sides) == (2 if name == "sts-b-reranking" else 3)
        assert all(side["metrics"].keys() == result["case"]["metrics"].keys() for side in sides)
        assert all(side["seconds"] > 0 for side in sides[:2])
        assert sides[0]["train_loss"] == pytest.approx(sides[1]["train_loss"], rel=0.2)  # other dropout masks
        assert table_row(name, result) in ran.stdout
    questions = (tmp_path / "runs" / "validation.jsonl").read_text().splitlines()
    assert len(questions) == 160 // 5
    assert {*json.loads(questions[0])} == {"question", "context"}


def test_the_rows_of_reproducing_are_those_of_the_result_files(table_row):
    text = (ROOT / "docs" / "REPRODUCING.md").read_text(encoding="utf-8")
    for file in (ROOT / "bench" / "results").rglob("sentence_tasks-*.json"):
        row = table_row(file.stem.removeprefix("sentence_tasks-"), json.loads(file.read_text(encoding="utf-8")))
        assert row in text, f"docs/REPRODUCING.md lacks the row of {file.name}: {row}"


def test_a_row_of_reproducing_has_percents_and_an_empty_cell_for_what_is_missing(table_row):
    case = {"epochs": 1, "batch": 32, "rate": 2e-5}
    sides = {side: {"metrics": {"ndcg_at_10": 0.5, "mrr_at_10": 0.4567}} for side in ("bertfast", "untrained")}
    cells = [cell.strip() for cell in table_row("squad-retrieval", {"case": case, **sides}).strip("|").split("|")]
    assert cells[1:] == ["1", "32", "2e-05", "50.0 (45.7)", "50.0 (45.7)", ""]


def test_the_page_has_a_row_per_task_precision_and_system():
    entry = {"bertfast_s": [0.1, 0.2, 0.3], "sentence_transformers_s": [0.5, 0.6, 0.7], "lower_bound_s": 0.05}
    tasks = {task: {"fp32": entry | {"gemm_gflops": 100}, "bf16": entry} for task in ("embedding", "reranking")}
    result = page.Result("sentence_training.json", {"origin": {"threads": 2}, "batch": 16, **tasks})
    first, second, *others = page.rows_of(result)
    assert len(others) == 6
    assert first.workload == second.workload == "fine-tuning step, MiniLM, embeddings (CoSENT), 16 pairs of STS-B"
    assert (first.system, first.precision, first.seconds, first.lower_bound) == ("bertfast", "fp32", 0.2, 0.05)
    assert (second.system, second.seconds, second.gemm_gflops) == ("sentence-transformers", 0.6, 100)
