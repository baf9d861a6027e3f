"""`bertfast demo`: a BERT of one's own in minutes, on a plain CPU and without a download.

Pre-trains a small model on the documentation of the installed Python packages, fine-tunes it to tell which package a
sentence documents, from the pre-trained weights and from random ones, and lets it fill in blanks.
"""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bertfast.data.corpus import held_out
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.sentences import split_sentences
from bertfast.inference.fill_mask import fill_mask
from bertfast.models.bert import BertForMaskedLM
from bertfast.runtime.signals import RunStopped
from bertfast.tasks.pretrained import open_model
from bertfast.training.evaluate import write_results
from bertfast.training.finetune import FinetuneSettings, finetune
from bertfast.training.pretrain import PretrainSettings, pretrain

HELD_OUT = 4  # percent of the modules, kept from both kinds of training
PACKAGES = 10  # to tell apart: those with most to say
SENTENCES = 1000  # of each package to learn from, at most
WORDS = 8  # in a sentence at least, so that there is something to go by

BLANKS = (
    "Returns True [MASK] the object is a string, and False otherwise.",
    "Return the number [MASK] elements in the list.",
    "The name of the [MASK] to read from.",
    "Path to a [MASK] or directory.",
    "Raises an [MASK] if the file does not exist.",
)


@dataclass
class DemoSettings:
    """Where the demo works, and how long it pre-trains.

    Attributes:
        output_dir: Folder for all that it makes; what is finished there is not done again.
        minutes: Length of the pre-training.
        seed: Decides everything random.
    """

    output_dir: str = "demo"
    minutes: float = 4.0
    seed: int = 1


def demo(settings: DemoSettings) -> dict[str, float]:
    """Run it and print what came out; returns the figures."""
    folder = Path(settings.output_dir)
    print("1. Text: the documentation of the Python packages installed here.")
    corpus = CorpusSettings(vocab_size=4096, validation_split_percentage=HELD_OUT)
    data = prepare(PrepareSettings(str(folder / "data"), corpus))

    model = folder / "model"
    train, validation = write_task(data / "docstrings.jsonl", folder / "task", settings.seed)
    try:
        print("2. Pre-training: masked LM and next-sentence prediction.")
        pretrained = pretrain(_pretraining(settings, data, model))
        print("3. Fine-tuning: which package does this sentence document?")
        scores = {name: _finetune(settings, model, folder / name, train, validation) for name in ("tuned", "untaught")}
    except RunStopped as stopped:
        raise RunStopped(f"{str(stopped).partition(':')[0]}: the same command goes on with the demo") from None

    print("\n4. Five blanks, each with the five words it likes best.")
    filler, tokenizer = open_model(BertForMaskedLM, str(model), "cls.predictions.transform")
    for text in BLANKS:
        words = ", ".join(f"{word} {probability:.0%}" for word, probability in fill_mask(filler, tokenizer, text)[0])
        print(f"   {text}\n      {words}")

    ahead = pretrained["unigram_entropy"] - pretrained["validation_loss"]
    print(
        f"\n5. On text it never saw, the loss is {pretrained['validation_loss']:.2f} nats a blank; the frequency of "
        f"words alone gives {pretrained['unigram_entropy']:.2f}, {ahead:.2f} more.\n"
        f"   It tells the package of {scores['tuned']:.1%} of the sentences; "
        f"fine-tuned from a random start, of {scores['untaught']:.1%}.\n"
        f"   Model: {model}. Metrics: {model / 'metrics.jsonl'}. Plot: {model / 'loss.png'}."
    )
    results = {**pretrained, "accuracy": scores["tuned"], "accuracy_from_random_start": scores["untaught"]}
    write_results(folder / "results.json", results)
    return results


def write_task(corpus: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Sentences labelled with their package, as JSON lines: (to learn from, to validate on, of other modules)."""
    sentences = {split: defaultdict(list) for split in (False, True)}  # is it held out: package: sentences
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            module = json.loads(line)
            paragraphs = module["text"].split("\n")
            found = [s for paragraph in paragraphs for s in split_sentences(paragraph) if len(s.split()) >= WORDS]
            sentences[held_out(paragraphs, HELD_OUT)][module["package"]] += found
    packages = sorted(sentences[False], key=lambda name: -len(sentences[False][name]))[:PACKAGES]
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, limit in ((False, SENTENCES), (True, SENTENCES // 5)):
        paths.append(folder / f"{'validation' if split else 'train'}.jsonl")
        with paths[-1].open("w", encoding="utf-8") as file:
            for package in packages:
                own = sentences[split][package]
                for index in generator.permutation(len(own))[:limit]:
                    file.write(json.dumps({"text": own[index], "label": package}) + "\n")
    return paths[0], paths[1]


def _pretraining(settings: DemoSettings, data: Path, model: Path) -> PretrainSettings:
    # Muon leaves the plateau of word frequencies within a minute, where AdamW stays for all four (bench/LOG.md).
    return PretrainSettings(
        output_dir=str(model),
        data_dir=str(data),
        sampling=Sampling(max_seq_length=64, mlm_probability=0.2),
        preset="tiny",
        config_overrides="max_position_embeddings=128",
        tokens_per_batch=2048,
        minutes=settings.minutes,
        optimizer="muon",
        learning_rate=4e-3,
        warmup_ratio=0.05,
        adam_beta2=0.98,
        dropout=0.0,
        seed=settings.seed,
        eval_steps=200,
        save_steps=200,
        resume=True,
    )


def _finetune(settings: DemoSettings, model: Path, output: Path, train: Path, validation: Path) -> float:
    shutil.rmtree(output, ignore_errors=True)
    results = finetune(
        FinetuneSettings(
            model_name_or_path=str(model),
            train_file=str(train),
            validation_file=str(validation),
            output_dir=str(output),
            random_init=output.name == "untaught",
            max_seq_length=64,
            num_train_epochs=2,
            learning_rate=5e-4,
            seed=settings.seed,
        )
    )
    return results["eval_accuracy"]
