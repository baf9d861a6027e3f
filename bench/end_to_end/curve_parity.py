"""Whether our program's loss falls as that of a plain loop around transformers, on the same samples.

`mini` on WikiText-2 from the same random weights, 300 steps: 50 without dropout, whose losses must agree to 1e-3, and
300 with dropout for each of three seeds, whose losses, smoothed over the last 50 steps, must end within 0.02 nats. Ours
is `bertfast pretrain`; theirs pads what ours packs, masks included, and draws dropout as PyTorch does. Curves that
FOLDER holds already are not run again.

    python -m bench.end_to_end.curve_parity DATA [--output FOLDER] [--results FOLDER]

DATA holds corpus/wikitext2-detok-{train,valid}.txt.xz.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bench.harness import RESULTS, write_result
from bertfast import BertForPreTraining, preset_config
from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer
from bertfast.encoder.unpadding import Layout
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.training.pretrain import Pretraining, PretrainSettings
from bertfast.training.schedule import schedule

STEPS, WITHOUT_DROPOUT, SMOOTHED = 300, 50, 50
SEEDS = (1, 2, 3)
VOCABULARY, RATE, DECAY, CLIP = 8192, 1e-3, 0.01, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, help="keep shards, runs and curves here")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for what was measured")
    arguments = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        shards = prepare(PrepareSettings(str(folder / "data"), corpus(arguments.data / "corpus")))
        start = starting_model(folder / "start", shards)
        plain = curves(folder, shards, start, dropout=0.0, seed=0, steps=WITHOUT_DROPOUT)
        dropped = {seed: curves(folder, shards, start, dropout=0.1, seed=seed, steps=STEPS) for seed in SEEDS}
    ends = {who: [mean(pair[who][-SMOOTHED:]) for pair in dropped.values()] for who in ("ours", "theirs")}
    result = {
        "largest_difference_without_dropout": max(abs(a - b) for a, b in zip(*plain.values(), strict=True)),
        "ends_with_dropout": ends,
        "difference_with_dropout": mean(ends["ours"]) - mean(ends["theirs"]),
        "without_dropout": plain,
        "with_dropout": dropped,
    }
    path = write_result("curve_parity", result, arguments.results)
    plot(dropped, arguments.results / "curve_parity.png")
    print(
        f"without dropout losses differ by {result['largest_difference_without_dropout']:.1e} at most; with dropout "
        f"they end at {mean(ends['ours']):.3f} and {mean(ends['theirs']):.3f}; written to {path}"
    )
    if result["largest_difference_without_dropout"] > 1e-3 or abs(result["difference_with_dropout"]) > 0.02:
        raise SystemExit("the curves differ by more than 1e-3 without dropout, or 0.02 with it")


def corpus(folder: Path) -> CorpusSettings:
    """WikiText-2, with a vocabulary of its own."""
    train, valid = (str(folder / f"wikitext2-detok-{split}.txt.xz") for split in ("train", "valid"))
    return CorpusSettings([train], [valid], vocab_size=VOCABULARY)


def starting_model(folder: Path, shards: Path) -> Path:
    """Random weights that both sides start from."""
    torch.manual_seed(0)
    BertForPreTraining(preset_config("mini", vocab_size=VOCABULARY)).save_pretrained(folder)
    save_tokenizer(load_tokenizer(shards), folder)
    return folder


def curves(folder: Path, shards: Path, start: Path, *, dropout: float, seed: int, steps: int) -> dict[str, list[float]]:
    """Losses, masked LM and next sentence together, of both sides' steps."""
    file = folder / f"curves-{dropout}-{seed}.json"
    if not file.exists():
        settings = PretrainSettings.of(
            output_dir=str(folder / f"run-{dropout}-{seed}"),
            data_dir=str(shards),
            sampling=Sampling(max_seq_length=128),
            init_from=str(start),
            tokens_per_batch=1024,
            max_steps=steps,
            learning_rate=RATE,
            warmup_ratio=0.1,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            dropout=dropout,
            seed=seed,
            precision="fp32",
            logging_steps=1,
            eval_batches=1,
            save_steps=100,
            resume=True,
        )
        run = Pretraining(settings)
        both = {"ours": our_losses(run), "theirs": their_losses(settings, run.plan.batches)}
        file.write_text(json.dumps(both), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def our_losses(run: Pretraining) -> list[float]:
    """Of the steps of `bertfast pretrain`."""
    run.run(lambda step: None)
    entries = run.metrics_log.entries()
    return [entry["masked_lm_loss"] + entry["next_sentence_loss"] for entry in entries if "masked_lm_loss" in entry]


def their_losses(settings: PretrainSettings, batches: Batches) -> list[float]:
    """Of a loop as one would write it around transformers' model, on the batches of that run."""
    torch.manual_seed(settings.seed)
    drop = {"hidden_dropout_prob": settings.model.dropout, "attention_probs_dropout_prob": settings.model.dropout}
    model = transformers.BertForPreTraining.from_pretrained(settings.model.init_from, **drop).train()
    decays, others = ([p for p in model.parameters() if (p.dim() > 1) == decay] for decay in (True, False))
    groups = [
        {"params": decays, "weight_decay": settings.optimizer.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer, losses = torch.optim.AdamW(groups, lr=settings.optimizer.learning_rate), []
    for step in tqdm(range(settings.duration.max_steps), desc="transformers", unit="step"):
        loss = model(**padded(batches.bin(step, 0))).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), settings.optimizer.max_grad_norm)
        share = schedule(
            settings.optimizer.schedule, step / settings.duration.max_steps, settings.optimizer.warmup_ratio
        )
        for group in optimizer.param_groups:
            group["lr"] = settings.optimizer.learning_rate * share
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """The batch as transformers takes it."""
    rows = [row for row, length in enumerate(batch.sequences.lengths) if length]
    labels = torch.full_like(batch.token_ids, IGNORE_INDEX)
    labels[batch.masked_rows[: batch.masked]] = batch.labels[: batch.masked]
    layout = Layout.of(batch.sequences, batch.sequences.max_seqlen)
    inputs = {"input_ids": batch.token_ids, "token_type_ids": batch.token_type_ids, "labels": labels}
    inputs = {
        name: layout.pad(values, IGNORE_INDEX if name == "labels" else 0)[rows] for name, values in inputs.items()
    }
    inputs["attention_mask"] = layout.pad(torch.ones_like(batch.token_ids))[rows]
    pairs = batch.next_sentence_labels
    return inputs if pairs is None else inputs | {"next_sentence_label": pairs[rows]}


def mean(values) -> float:
    """Of numbers."""
    values = list(values)
    return sum(values) / len(values)


def plot(pairs: dict[int, dict[str, list[float]]], path: Path) -> None:
    """The curves with dropout, each smoothed, of all seeds."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for pair in pairs.values():
        for (who, losses), color in zip(pair.items(), ("tab:blue", "tab:orange"), strict=True):
            smooth = [mean(losses[max(0, step - 20) : step + 1]) for step in range(len(losses))]
            axes.plot(smooth, color=color, linewidth=1, label=who if pair is pairs[next(iter(pairs))] else None)
    axes.set(xlabel="step", ylabel="loss, mean of the last 20 steps")
    axes.legend(labels=["bertfast", "transformers"])
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
