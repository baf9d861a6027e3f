"""Training files of each task that a tiny model learns in seconds, and settings to fine-tune it."""

import json
import random
from pathlib import Path

import numpy as np
import torch
from sentiment import QUICK, sentence
from torch.nn.utils.rnn import pad_sequence

from bertfast.tasks.features import Features
from bertfast.training.finetuning import FinetuneSettings


def write_examples(folder: Path, task: str, rows: int, seed: int) -> Path:
    """Write a file whose labels depend on whether, or where, a text contains "good" or "bad"."""
    random_ = random.Random(seed)
    texts = [sentence(random_, random_.choice(["good", "bad"])) for _ in range(rows)]
    texts = [" ".join(text.split()[: random_.randint(4, 6)]) + f" {random_.choice(['good', 'bad'])}" for text in texts]
    suffixes = {"multiple-choice": "csv", "question-answering": "json", "token-classification": "conll"}
    path = folder / f"a.{suffixes.get(task, 'tsv')}"
    if task == "multiple-choice":
        lines = [f'"{text}","the film was good","the film was bad",{int("good" in text)}' for text in texts]
        path.write_text("\n".join(["sent1,ending0,ending1,label", *lines]))
    elif task == "question-answering":
        paragraphs = [
            {
                "context": text,
                "qas": [{"id": str(i), "question": "what film", "answers": [answer(text)], "is_impossible": False}],
            }
            for i, text in enumerate(texts)
        ]
        path.write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    elif task == "token-classification":
        tags = {"good": "B-GOOD", "bad": "B-BAD"}
        sentences = ["\n".join(f"{word}\t{tags.get(word, 'O')}" for word in text.split()) for text in texts]
        path.write_text("\n\n".join(sentences) + "\n")
    else:
        labels = {
            "sequence-classification": lambda text: ["bad", "good"]["good" in text],
            "regression": lambda text: f"{0.5 + text.split().count('good')}",
            "multi-label": lambda text: ",".join(word for word in ("good", "bad") if word in text),
        }[task]
        path.write_text("\n".join(["sentence\tlabel", *(f"{text}\t{labels(text)}" for text in texts)]))
    return path


def answer(text: str) -> dict:
    word = "good" if "good" in text else "bad"
    return {"text": word, "answer_start": text.index(word)}


def settings_for(task: str, model: Path, file: Path, folder: Path, **changes) -> FinetuneSettings:
    values = {"dropout": 0.0, "tokens_per_batch": 10**6, "logging_steps": 1} | QUICK | changes
    if "max_steps" not in values:
        values.setdefault("num_train_epochs", 3)
    return FinetuneSettings.of(
        model_name_or_path=str(model), task=task, train_file=str(file), output_dir=str(folder), **values
    )


def padded(features: Features, rows: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the examples as padded inputs of transformers."""
    sequences = [row * features.num_choices + i for row in rows for i in range(features.num_choices)]
    spans = [slice(*features.cu_seqlens[i : i + 2]) for i in sequences]

    def spread(values: np.ndarray, rest: int) -> torch.Tensor:
        return pad_sequence([torch.from_numpy(values[span].astype(np.int64)) for span in spans], True, rest)

    batch = {"input_ids": spread(features.token_ids, 0), "token_type_ids": spread(features.token_type_ids, 0)}
    batch["attention_mask"] = spread(np.ones_like(features.token_ids), 0)
    if features.num_choices > 1:
        batch = {name: values.unflatten(0, (-1, features.num_choices)) for name, values in batch.items()}
    for name, values in features.labels.items():
        per_token = len(values) == len(features.token_ids)
        batch[name] = spread(values, -100) if per_token else torch.from_numpy(values[rows])
    return batch
