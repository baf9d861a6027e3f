"""Compare the loss curve of `bertfast pretrain` with that of a plain loop around transformers on the same samples.

Both train `mini` on WikiText-2 from the same random weights: 50 steps without dropout, whose losses must agree within
1e-3, and 300 steps with dropout for each of three seeds, whose mean losses over the last 50 steps must agree within
0.02 nats. The plain loop pads the packed batches and draws PyTorch's dropout masks. Curves that are already in FOLDER
are not computed again.

    python -m bench.end_to_end.curve_parity DATA [--output FOLDER] [--results FOLDER]

DATA contains corpus/wikitext2-detok-{train,valid}.txt.xz.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from bench.arguments import result_parser
from bench.figures import hardware, save
from bench.result_files import RESULTS, require_clean_tree, write_result
from bertfast import BertForPreTraining, preset_config
from bertfast.architectures.presets import Preset
from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.tokenizer import load_tokenizer, save_tokenizer
from bertfast.encoder.parts import has_token_types
from bertfast.encoder.unpadding import Layout
from bertfast.ops.reference import IGNORE_INDEX
from bertfast.runtime.plotting import COLORS
from bertfast.training.pretraining import Pretraining, PretrainSettings
from bertfast.training.schedule import schedule

STEPS, STEPS_WITHOUT_DROPOUT, SMOOTHED = 300, 50, 50
SEEDS = (1, 2, 3)
VOCAB_SIZE, LEARNING_RATE, WEIGHT_DECAY, MAX_GRAD_NORM = 8192, 1e-3, 0.01, 1.0
TOLERANCE, TOLERANCE_OF_MEANS = 1e-3, 0.02  # nats: of each loss without dropout, and of the mean of the last losses


def main() -> None:
    parser = result_parser(__doc__, RESULTS)
    parser.add_argument("data", type=Path, help="folder with the texts")
    parser.add_argument("--output", type=Path, help="folder to keep shards, runs and curves")
    arguments = parser.parse_args()
    require_clean_tree(arguments.results)
    with TemporaryDirectory() as scratch:
        folder = arguments.output or Path(scratch)
        shards = prepare(PrepareSettings(str(folder / "data"), corpus(arguments.data / "corpus")))
        initial = initial_model(folder / "start", shards)
        plain = curves(folder, shards, initial, dropout=0.0, seed=0, steps=STEPS_WITHOUT_DROPOUT)
        dropped = {seed: curves(folder, shards, initial, dropout=0.1, seed=seed, steps=STEPS) for seed in SEEDS}
    ends = {name: [mean(pair[name][-SMOOTHED:]) for pair in dropped.values()] for name in ("bertfast", "transformers")}
    result = {
        "largest_difference_without_dropout": max(abs(a - b) for a, b in zip(*plain.values(), strict=True)),
        "ends_with_dropout": ends,
        "difference_with_dropout": mean(ends["bertfast"]) - mean(ends["transformers"]),
        "without_dropout": plain,
        "with_dropout": dropped,
    }
    path = write_result("curve_parity", result, arguments.results)
    plot(path)
    print(
        f"without dropout, losses differ by at most {result['largest_difference_without_dropout']:.1e}; with dropout, "
        f"they end at {mean(ends['bertfast']):.3f} (bertfast) and {mean(ends['transformers']):.3f} (transformers); "
        f"written to {path}"
    )
    is_close = result["largest_difference_without_dropout"] <= TOLERANCE
    if not is_close or abs(result["difference_with_dropout"]) > TOLERANCE_OF_MEANS:
        raise SystemExit(
            f"the curves differ by more than {TOLERANCE} without dropout, or by more than {TOLERANCE_OF_MEANS} with it"
        )


def corpus(folder: Path) -> CorpusSettings:
    """Return the settings of WikiText-2, with its own vocabulary."""
    train, valid = (str(folder / f"wikitext2-detok-{split}.txt.xz") for split in ("train", "valid"))
    return CorpusSettings([train], [valid], vocab_size=VOCAB_SIZE)


def initial_model(folder: Path, shards: Path, preset: Preset = "mini", seed: int = 0) -> Path:
    """Write the random weights from which both sides start, with the tokenizer of the shards; return their folder."""
    torch.manual_seed(seed)
    tokenizer = load_tokenizer(shards)
    BertForPreTraining(preset_config(preset, vocab_size=tokenizer.get_vocab_size())).save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return folder


def curves(
    folder: Path, shards: Path, initial: Path, *, dropout: float, seed: int, steps: int
) -> dict[str, list[float]]:
    """Return the losses of all steps, masked LM plus next sentence, of bertfast and of the plain loop."""
    file = folder / f"curves-{dropout}-{seed}.json"
    if not file.exists():
        settings = PretrainSettings.of(
            output_dir=str(folder / f"run-{dropout}-{seed}"),
            data_dir=str(shards),
            sampling=Sampling(max_seq_length=128),
            init_from=str(initial),
            tokens_per_batch=1024,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            warmup_ratio=0.1,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=MAX_GRAD_NORM,
            dropout=dropout,
            seed=seed,
            precision="fp32",
            logging_steps=1,
            eval_batches=1,
            save_steps=100,
            resume=True,
        )
        run = Pretraining(settings)
        torch.manual_seed(seed)
        model = transformers.BertForPreTraining.from_pretrained(
            initial, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
        )
        both = {"bertfast": losses_of(run), "transformers": plain_losses(model, settings, run.plan.batches)}
        file.write_text(json.dumps(both), encoding="utf-8")
    losses: dict[str, list[float]] = json.loads(file.read_text(encoding="utf-8"))
    return losses


def losses_of(run: Pretraining) -> list[float]:
    """Run `bertfast pretrain` and return the losses of its steps."""
    run.run(lambda step: None)
    assert run.metrics_log is not None, "the main process has a log"
    entries = run.metrics_log.entries()
    steps = (entry for entry in entries if "masked_lm_loss" in entry)
    return [entry["masked_lm_loss"] + entry.get("next_sentence_loss", 0.0) for entry in steps]


def plain_losses(model: transformers.PreTrainedModel, settings: PretrainSettings, batches: Batches) -> list[float]:
    """Train a model of transformers in a plain loop, on the batches of a run, and return the losses of its steps.

    Args:
        model: The model, with a masked-LM head; PyTorch's generator must be seeded if it has dropout.
        settings: Settings of the run.
        batches: Its batches, one per step.
    """
    model.train()
    takes_types, hyperparameters = has_token_types(model.config), settings.optimizer
    optimizer, losses = plain_adamw(model, hyperparameters.learning_rate, hyperparameters.weight_decay), []
    steps = settings.duration.max_steps
    for step in tqdm(range(steps), desc="transformers", unit="step"):
        inputs = padded(batches.bin(step, 0))
        loss = model(**{name: x for name, x in inputs.items() if takes_types or name != "token_type_ids"}).loss
        loss.backward()
        clip_grad_norm_(model.parameters(), hyperparameters.max_grad_norm)
        factor = schedule(hyperparameters.schedule, step / steps, hyperparameters.warmup_ratio)
        for group in optimizer.param_groups:
            group["lr"] = hyperparameters.learning_rate * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def plain_adamw(model: torch.nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Return PyTorch's AdamW without weight decay for biases and LayerNorm."""
    matrices, vectors = ([p for p in model.parameters() if (p.dim() > 1) == decays] for decays in (True, False))
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate)


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """Return a packed batch as padded inputs of transformers' model."""
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


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def plot(path: Path) -> None:
    """Draw the smoothed curves with dropout of all seeds in a result file; the PNG file is next to it."""
    from matplotlib import pyplot

    result = json.loads(path.read_text(encoding="utf-8"))
    pairs = result["with_dropout"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for index, pair in enumerate(pairs.values()):
        for name, losses in pair.items():
            smooth = [mean(losses[max(0, step - 20) : step + 1]) for step in range(len(losses))]
            axes.plot(smooth, color=COLORS[name], linewidth=1, label=None if index else name)
    title = f"BERT-mini on WikiText-2, fp32, dropout 0.1, {len(pairs)} seeds; {hardware(result['origin'])}"
    axes.set_title(title, fontsize="medium")
    axes.set(xlabel="step", ylabel="loss (nats), mean of the last 20 steps")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path.with_suffix(".png"), [result])


if __name__ == "__main__":
    main()
