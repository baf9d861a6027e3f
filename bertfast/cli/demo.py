"""`bertfast demo`: pre-train and fine-tune a small BERT in a few minutes on a CPU, without a download.

Pre-trains on the docstrings of the installed Python packages, fine-tunes a classifier that predicts which package a
sentence documents, once from the pre-trained weights and once from scratch, and predicts masked tokens.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bertfast.data.held_out import HeldOut
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.sentences import split_sentences
from bertfast.inference.fill_mask import fill_mask
from bertfast.models.bert import BertForMaskedLM
from bertfast.runtime.atomic_write import atomic_path
from bertfast.runtime.output_folder import Origin, output_folder
from bertfast.runtime.settings import Positive, Seed, Settings
from bertfast.runtime.signals import continued_by
from bertfast.tasks.pretrained import open_model
from bertfast.training.checkpoint import has_begun
from bertfast.training.evaluate import write_results
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.pretraining import PretrainSettings, pretrain

logger = logging.getLogger("bertfast")

_CONTENTS = ("data", "model", "task", "finetuned", "from-scratch", "results.json")
HELD_OUT = 4  # percent of the modules, held out from pre-training and fine-tuning
PACKAGES = 10  # classes of the classifier: the packages with the most sentences
SENTENCES = 1000  # maximum number of training sentences per package
WORDS = 8  # minimum number of words per sentence; shorter ones rarely identify a package

MASKED_TEXTS = (
    "Returns True [MASK] the object is a string, and False otherwise.",
    "Return the number [MASK] elements in the list.",
    "The name of the [MASK] to read from.",
    "Path to a [MASK] or directory.",
    "Raises an [MASK] if the file does not exist.",
)


@dataclass(frozen=True, kw_only=True)
class DemoSettings(Settings):
    """Where the demo writes its files, and how long it pre-trains.

    Attributes:
        output_dir: Folder for all files; finished steps in it are not repeated.
        overwrite_output_dir: Replace a demo with other settings in --output-dir.
        minutes: Duration of pre-training in minutes.
        seed: Seed of all random numbers.
    """

    output_dir: str = "demo"
    overwrite_output_dir: bool = False
    minutes: Positive = 4.0
    seed: Seed = 1


def demo(settings: DemoSettings) -> dict[str, float]:
    """Run the demo, print its results, and return them by name.

    Raises:
        ValueError: The folder has a demo with other settings, or is in use.
    """
    origin = Origin({}, {"--minutes": settings.minutes, "--seed": settings.seed}, "demo")
    with output_folder(Path(settings.output_dir), origin, _CONTENTS, overwrite=settings.overwrite_output_dir) as folder:
        return _demo(settings, folder)


def _demo(settings: DemoSettings, folder: Path) -> dict[str, float]:
    """Run the demo in its locked folder."""
    logger.info("1. Text: the docstrings of the installed Python packages.")
    corpus = CorpusSettings(vocab_size=4096, validation_split_percentage=HELD_OUT)
    data = prepare(PrepareSettings(str(folder / "data"), corpus))

    model = folder / "model"
    train, validation = write_task(data / "docstrings.jsonl", folder / "task", settings.seed)
    with continued_by("demo"):
        logger.info("2. Pre-training: masked LM and next-sentence prediction.")
        pretrained = pretrain(_pretraining(settings, data, model))
        logger.info("3. Fine-tuning: which package does this sentence document?")
        scores = {
            name: _finetune(settings, model, folder / name, train, validation) for name in ("finetuned", "from-scratch")
        }

    print("4. Masked tokens: the five most likely predictions for each.")
    masked_lm, tokenizer = open_model(BertForMaskedLM, str(model), True)
    for text in MASKED_TEXTS:
        predictions = fill_mask(masked_lm, tokenizer, text)[0]
        print(f"   {text}\n      " + ", ".join(f"{token} {probability:.0%}" for token, probability in predictions))

    gain = pretrained["unigram_entropy"] - pretrained["validation_loss"]
    print(
        f"\n5. Validation loss: {pretrained['validation_loss']:.2f} nats per masked token, {gain:.2f} less than the "
        f"unigram baseline of {pretrained['unigram_entropy']:.2f}.\n"
        f"   Classification accuracy: {scores['finetuned']:.1%}; trained from scratch: {scores['from-scratch']:.1%}.\n"
        f"   Model: {model}. Metrics: {model / 'metrics.jsonl'}. Plot: {model / 'loss.png'}."
    )
    results = {**pretrained, "accuracy": scores["finetuned"], "accuracy_from_scratch": scores["from-scratch"]}
    write_results(folder / "results.json", results)
    return results


def write_task(corpus: Path, folder: Path, seed: int) -> tuple[Path, Path]:
    """Write sentences labelled with their package as JSON lines.

    Args:
        corpus: The file that `gather_docstrings` wrote.
        folder: Folder for the two files.
        seed: Seed of the choice of sentences.

    Returns:
        The training file and the validation file, which has sentences of other modules.
    """
    held_out = HeldOut.share(HELD_OUT)
    # Whether held out: package: sentences.
    sentences: dict[bool, dict[str, list[str]]] = {split: defaultdict(list) for split in (False, True)}
    with corpus.open(encoding="utf-8") as file:
        for line in file:
            module = json.loads(line)
            paragraphs = module["text"].split("\n")
            found = [s for paragraph in paragraphs for s in split_sentences(paragraph) if len(s.split()) >= WORDS]
            sentences[held_out.holds(paragraphs)][module["package"]] += found
    packages = sorted(sentences[False], key=lambda name: -len(sentences[False][name]))[:PACKAGES]
    generator = np.random.default_rng(seed)
    paths = []
    for split, limit in ((False, SENTENCES), (True, SENTENCES // 5)):
        paths.append(folder / f"{'validation' if split else 'train'}.jsonl")
        with atomic_path(paths[-1]) as temporary, temporary.open("w", encoding="utf-8") as file:
            for package in packages:
                texts = sentences[split][package]
                for index in generator.permutation(len(texts))[:limit]:
                    file.write(json.dumps({"text": texts[index], "label": package}) + "\n")
    return paths[0], paths[1]


def _pretraining(settings: DemoSettings, data: Path, model: Path) -> PretrainSettings:
    # Muon beats the unigram baseline within a minute; AdamW stays on its plateau for all four (bench/LOG.md).
    return PretrainSettings.of(
        output_dir=str(model),
        data_dir=str(data),
        max_seq_length=64,
        mlm_probability=0.2,
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
        resume=has_begun(model),
    )


def _finetune(settings: DemoSettings, model: Path, output: Path, train: Path, validation: Path) -> float:
    results = finetune(
        FinetuneSettings.of(
            model_name_or_path=str(model),
            train_file=str(train),
            validation_file=str(validation),
            output_dir=str(output),
            resume=has_begun(output),
            random_init=output.name == "from-scratch",
            max_seq_length=64,
            num_train_epochs=2,
            learning_rate=5e-4,
            seed=settings.seed,
        )
    )
    return results["eval_accuracy"]
