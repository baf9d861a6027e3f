"""Pre-training (Devlin et al., 2019, section 3.1): masked LM and next-sentence prediction on packed batches."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from bertfast import checkpoint
from bertfast.config import Preset
from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, save_tokenizer, special_tokens, tokenizer_hash
from bertfast.encoder import pretraining_loss
from bertfast.training.interrupt import Interrupt, RunStopped
from bertfast.training.journal import Journal
from bertfast.training.optimizer import SKIPS_IN_A_ROW, OptimizerName, build_optimizers, step_if_finite
from bertfast.training.precision import Precision, autocast, choose_device, choose_precision
from bertfast.training.schedule import linear
from bertfast.training.start import starting_config, starting_model
from bertfast.training.state import checkpoints, load_state, read_progress, save_state
from bertfast.training.validation import unigram_entropy, validate

# What may differ between a run and its continuation: where it computes, and how often it looks up from its work.
_MAY_CHANGE = ("output_dir", "resume", "device", "logging_steps", "eval_steps", "save_steps", "save_total_limit")


@dataclass
class PretrainSettings:
    """What to pre-train, on what, and how.

    Attributes:
        output_dir: Folder for the model, its checkpoints, metrics.jsonl and loss.png.
        data_dir: Folder that `bertfast prepare` wrote; none: prepare the text in output_dir/data first.
        corpus: Which text, and how it becomes tokens.
        sampling: How samples are cut and masked.
        preset: Size of the model, as published.
        config_overrides: Changes to it, such as "num_hidden_layers=2,hidden_size=256".
        init_from: Go on from this model (folder or hub id), not from random weights.
        max_positions: Positions of the model; more than a checkpoint has extend it.
        tokens_per_batch: Tokens that one forward and backward pass takes.
        gradient_accumulation_steps: Batches whose gradients make one step.
        max_steps: Steps of the run; 0: as many as num_train_epochs take.
        num_train_epochs: Times that every document is seen.
        minutes: Length of the run by the clock instead; the learning rate reaches 0 when it is over.
        optimizer: AdamW as in the paper, or Muon for the matrices and AdamW for the rest.
        learning_rate: At the end of the warm-up; it then falls linearly to 0.
        warmup_ratio: Share of the run in which the rate rises.
        weight_decay: Of weights; biases and LayerNorms do not decay.
        adam_beta1: AdamW's first decay rate.
        adam_beta2: AdamW's second decay rate.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        dropout: Of hidden activations and attention.
        seed: Decides weights, samples, masks and dropout.
        precision: fp32, or bf16 products with fp32 weights; auto: bf16 where the device multiplies it natively
            and, on a CPU, faster.
        device: Such as "cpu" or "cuda:0"; none: a GPU if there is one.
        logging_steps: Steps between entries of metrics.jsonl.
        eval_steps: Steps between validations; the end of the run is one in any case.
        eval_batches: Batches to validate on.
        save_steps: Steps between checkpoints.
        save_total_limit: Checkpoints to keep.
        resume: Go on from the newest checkpoint in output_dir.
    """

    output_dir: str
    data_dir: str | None = None
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    sampling: Sampling = field(default_factory=Sampling)
    preset: Preset = "small"
    config_overrides: str = ""
    init_from: str | None = None
    max_positions: int | None = None
    tokens_per_batch: int = 4096
    gradient_accumulation_steps: int = 1
    max_steps: int = 0
    num_train_epochs: float = 1
    minutes: float | None = None
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    warmup_ratio: float = 0.01
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    seed: int = 42
    precision: Precision = "auto"
    device: str | None = None
    logging_steps: int = 10
    eval_steps: int = 500
    eval_batches: int = 50
    save_steps: int = 500
    save_total_limit: int = 2
    resume: bool = False


def pretrain(settings: PretrainSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Do the run; `on_step` is called with the number of steps done after each. Returns the last validation's metrics.

    Leaves in `output_dir` a folder that `transformers.BertForPreTraining.from_pretrained` opens.
    """
    return Pretraining(settings).run(on_step)


class Pretraining:
    """One run: what it works on, and its loop."""

    def __init__(self, settings: PretrainSettings):
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self.saved = self._checkpoint_to_resume()
        self.device = choose_device(settings.device)
        self.precision = choose_precision(self.device, settings.precision)
        torch.manual_seed(settings.seed)
        start = None if settings.init_from is None else checkpoint.resolve(settings.init_from)
        config = starting_config(
            start, settings.preset, settings.config_overrides, settings.dropout, settings.max_positions
        )
        if settings.sampling.max_seq_length > config.max_position_embeddings:
            raise ValueError(
                f"max_seq_length {settings.sampling.max_seq_length} is more than the model's "
                f"{config.max_position_embeddings} positions: lower it, or raise max_positions"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open_data(start)
        config.vocab_size = max(config.vocab_size, self.train.vocabulary_size) if start else self.train.vocabulary_size
        self.model = starting_model(config, start).to(self.device).train()
        betas = (settings.adam_beta1, settings.adam_beta2)
        self.optimizers = build_optimizers(
            self.model, settings.optimizer, settings.learning_rate, settings.weight_decay, betas
        )
        self.dropout_seed = torch.tensor(settings.seed, device=self.device)
        self.steps = settings.max_steps or math.ceil(settings.num_train_epochs * self.batches.steps_per_epoch)
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seconds = 0.0
        if self.saved is not None:
            load_state(self.saved, self.model, self.optimizers)
            self.step, progress = read_progress(self.saved)
            self.seconds, self.skipped = progress["seconds"], progress["skipped"]
        self.journal = Journal(self.folder, steps_done=self.step)

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """The loop, from where the run stands to its end; the last validation's metrics."""
        settings = self.settings
        self._announce()
        with Interrupt() as interrupt, self._progress_bar() as bar:
            while (progress := self._progress()) < 1:
                started = time.perf_counter()
                rate = settings.learning_rate * linear(progress, settings.warmup_ratio)
                losses = self._train_step(rate)
                self.step += 1
                elapsed = time.perf_counter() - started
                self.seconds += elapsed
                self._report(bar, losses, rate, elapsed)
                on_step(self.step)
                if self.skipped_in_a_row == SKIPS_IN_A_ROW:
                    raise RunStopped(
                        f"{SKIPS_IN_A_ROW} steps in a row had no finite loss and gradient: lower the learning rate; "
                        f"the newest checkpoint in {self.folder / 'checkpoints'} is kept"
                    )
                if interrupt.requested:
                    self._save()
                    raise RunStopped(
                        f"stopped after step {self.step}, with a checkpoint: the same command with --resume goes on"
                    )
                if self._progress() < 1:
                    if self.step % settings.eval_steps == 0:
                        self._validate()
                    if self.step % settings.save_steps == 0 and not self.skipped_in_a_row:
                        self._save()
        metrics = self._validate()
        self._save()
        self.model.save_pretrained(self.folder)
        save_tokenizer(self.tokenizer, self.folder)
        if not self.journal.plot(self.folder / "loss.png", unigram_entropy=metrics["unigram_entropy"]):
            print("No loss.png: that wants `pip install bertfast[plots]`.")
        print(f"Model, metrics.jsonl and checkpoints are in {self.folder}.")
        return metrics

    def _train_step(self, rate: float) -> dict[str, float] | None:
        """One step of the optimizers; the step's mean losses, or None if they were not finite and it was skipped."""
        count = self.batches.bins_per_step
        batches = [self.batches.bin(self.step, index) for index in range(count)]
        masked = max(sum(batch.masked for batch in batches), 1)
        pairs = max(sum(sum(length > 0 for length in batch.sequences.lengths) for batch in batches), 1)
        # Means over the whole step's tokens and pairs, so that it does not matter into how many batches it is cut.
        sums = sum(self._backward(batch.to(self.device), masked, pairs) for batch in batches)
        masked_lm, correct, next_sentence, next_correct = sums.tolist()
        loss = masked_lm + next_sentence
        norm = step_if_finite(self.model, self.optimizers, rate, self.settings.max_grad_norm, loss)
        if norm is None:
            self.skipped += 1
            self.skipped_in_a_row += 1
            return None
        self.skipped_in_a_row = 0
        losses = {"masked_lm_loss": masked_lm / masked, "masked_lm_accuracy": correct / masked}
        if self.settings.sampling.pairs:
            losses |= {"next_sentence_loss": next_sentence / pairs, "next_sentence_accuracy": next_correct / pairs}
        return losses | {"gradient_norm": norm}

    def _backward(self, batch: Batch, masked: int, pairs: int) -> Tensor:
        with autocast(self.device, self.precision):
            loss = pretraining_loss(self.model, batch, self.dropout_seed)
        (loss.masked_lm / masked + loss.next_sentence / pairs).backward()
        return torch.stack(
            [loss.masked_lm.detach(), loss.masked_correct, loss.next_sentence.detach(), loss.next_sentence_correct]
        )

    def _validate(self) -> dict[str, float]:
        metrics = validate(self.model, self.held_out, self.precision) | {"unigram_entropy": self.unigram_entropy}
        self.journal.write(step=self.step, seconds=round(self.seconds, 3), **metrics)
        tqdm.write(
            f"step {self.step}: validation loss {metrics['validation_loss']:.3f} (words alone: "
            f"{self.unigram_entropy:.3f}), {metrics['validation_accuracy']:.1%} of the blanks right, "
            f"perplexity {metrics['validation_perplexity']:.1f}"
            + (f", pairs {metrics['next_sentence_accuracy']:.1%} right" if "next_sentence_accuracy" in metrics else "")
        )
        return metrics

    def _save(self) -> None:
        progress = {"seconds": self.seconds, "skipped": self.skipped, "settings": self._settings_that_matter()}
        keep = self.settings.save_total_limit
        save_state(self.folder / "checkpoints", self.step, self.model, self.optimizers, progress, keep)

    def _checkpoint_to_resume(self) -> Path | None:
        folder = self.folder / "checkpoints"
        saved = checkpoints(folder)
        if not self.settings.resume:
            if saved:
                raise ValueError(f"{folder} already holds a run: add --resume to go on with it, or name another folder")
            return None
        if not saved:
            return None  # stopped before its first checkpoint: it begins again
        before, now = read_progress(saved[-1])[1]["settings"], self._settings_that_matter()
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"the run in {self.folder} was made with other settings ({', '.join(changed)}): "
                "repeat its command to resume it"
            )
        return saved[-1]

    def _settings_that_matter(self) -> dict:
        values = dataclasses.asdict(self.settings)
        return {name: value for name, value in values.items() if name not in _MAY_CHANGE}

    def _open_data(self, start: Path | None) -> None:
        settings = self.settings
        if settings.data_dir is None:
            corpus = settings.corpus
            if start is not None and corpus.tokenizer_name is None:
                corpus = dataclasses.replace(corpus, tokenizer_name=str(start))
            data = prepare(PrepareSettings(str(self.folder / "data"), corpus))
        else:
            data = Path(settings.data_dir)
        self.tokenizer = load_tokenizer(data)
        if start is not None and tokenizer_hash(load_tokenizer(start)) != tokenizer_hash(self.tokenizer):
            raise ValueError(f"the text in {data} was made tokens with another tokenizer than that of {start}")
        self.train, validation = (
            Shards.open(data / split, tokenizer_hash(self.tokenizer)) for split in ("train", "validation")
        )
        if not validation.documents:
            raise ValueError(f"{data} holds no text to validate on: raise validation_split_percentage")
        self.batches = self._batches(self.train, settings.gradient_accumulation_steps)
        self.held_out = list(self._batches(validation, 1).first_epoch(settings.eval_batches))
        self.unigram_entropy = unigram_entropy(self.train, self.held_out)

    def _batches(self, shards: Shards, bins_per_step: int) -> Batches:
        return Batches(
            shards,
            special_tokens(self.tokenizer),
            continuation_tokens(self.tokenizer),
            self.settings.sampling,
            tokens_per_bin=self.settings.tokens_per_batch,
            bins_per_step=bins_per_step,
            seed=self.settings.seed,
        )

    def _progress(self) -> float:
        """Share of the run that is done: of its steps, or of its minutes."""
        if self.settings.minutes is not None:
            return self.seconds / (60 * self.settings.minutes)
        return self.step / self.steps

    def _announce(self) -> None:
        config, parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        print(
            f"{parameters / 1e6:.1f} M parameters ({config.num_hidden_layers} layers, {config.hidden_size} wide), "
            f"{self.train.tokens / 1e6:.1f} M tokens in {self.train.documents} documents, "
            f"{self.batches.bins_per_step * self.settings.tokens_per_batch} tokens a step, "
            f"{self.precision} on {self.device}" + (f", from step {self.step}" if self.step else "")
        )

    def _progress_bar(self) -> tqdm:
        if self.settings.minutes is None:
            return tqdm(total=self.steps, initial=self.step, desc="pre-training", unit="step")
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=self.settings.minutes * 60, initial=self.seconds, desc="pre-training", bar_format=form)

    def _report(self, bar: tqdm, losses: dict[str, float] | None, rate: float, elapsed: float) -> None:
        bar.update(1 if self.settings.minutes is None else min(elapsed, bar.total - bar.n))
        if losses is None:
            tqdm.write(f"step {self.step}: the loss or its gradient is not finite; skipped ({self.skipped} so far)")
            self.journal.write(step=self.step, skipped=self.skipped)
            return
        speed = self.batches.bins_per_step * self.settings.tokens_per_batch / elapsed
        bar.set_postfix(loss=f"{losses['masked_lm_loss']:.3f}", tokens_per_second=f"{speed:.0f}")
        if self.step % self.settings.logging_steps == 0:
            self.journal.write(
                step=self.step,
                seconds=round(self.seconds, 3),
                learning_rate=rate,
                tokens_per_second=round(speed, 1),
                **losses,
            )
