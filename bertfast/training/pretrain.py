"""Pre-training (Devlin et al., 2019, section 3.1): masked LM and next-sentence prediction on packed batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed
from tqdm import tqdm

from bertfast.data.batches import Batch, Batches
from bertfast.data.prepare import CorpusSettings, PrepareSettings, prepare
from bertfast.data.samples import Sampling
from bertfast.data.shards import Shards
from bertfast.data.tokenizer import continuation_tokens, load_tokenizer, save_tokenizer, special_tokens, tokenizer_hash
from bertfast.encoder import PretrainingLoss
from bertfast.models.bert import BertForPreTraining
from bertfast.models.files import load, resolve, save
from bertfast.models.patch import require_packed
from bertfast.models.presets import Preset
from bertfast.runtime.cuda_graph import can_capture, cuda_graphs, side_stream
from bertfast.runtime.precision import Precision, ResidualPrecision, choose_precision, half
from bertfast.runtime.signals import Interrupt, RunStopped
from bertfast.training.checkpoint import checkpoints, load_state, newest_whole, read_progress, save_state
from bertfast.training.curriculum import Curriculum
from bertfast.training.distributed import Distributed
from bertfast.training.flops import gemm_throughput, step_flops
from bertfast.training.initial_model import initial_config, initial_model
from bertfast.training.loader import Loader
from bertfast.training.memory_estimate import available_memory, estimate_memory
from bertfast.training.metrics_log import MetricsLog, tensorboard, wandb
from bertfast.training.optimizer import SKIPS_IN_A_ROW, OptimizerName, build_optimizers, not_finite
from bertfast.training.schedule import ScheduleName, schedule
from bertfast.training.step import Objective, TrainStep
from bertfast.training.validation import unigram_entropy, validate

# What may differ between a run and its continuation: where it computes, and how often it looks up from its work. How
# many batches make a step must not, but how they are spread over ranks may.
_MAY_CHANGE = (
    "output_dir",
    "resume",
    "device",
    "dataloader_num_workers",
    "gradient_accumulation_steps",
    "checkpoint_layers",
    "shard",
    "logging_steps",
    "eval_steps",
    "save_steps",
    "save_total_limit",
    "sigterm_exit_code",
    "cuda_graph",
    "deterministic",
    "check_replay",
    "replay",
    "tensorboard",
    "wandb",
)

LOSS_EMA_DECAY = 0.98
SPIKE_THRESHOLD = 0.5  # nats above the loss EMA from which on a step is marked in metrics.jsonl


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
        gradient_accumulation_steps: Batches of each rank whose gradients make one step.
        batch_ramp: Share of the run in which a step takes a quarter of its batches, then half of them.
        second_phase_length: Sequences of this length at the end of the run, as in the paper; 0: no second phase.
        second_phase_share: Share of the run that they take.
        max_steps: Steps of the run; 0: as many as num_train_epochs take.
        num_train_epochs: Times that every document is seen.
        minutes: Length of the run by the clock instead; the learning rate reaches 0 when it is over.
        optimizer: AdamW as in the paper, LAMB for large batches, or Muon for the matrices and AdamW for the rest.
        learning_rate: At the end of the warm-up.
        schedule: How it then falls to 0: linearly; along half a wave (cosine); in the last fifth alone (wsd).
        warmup_ratio: Share of the run in which the rate rises.
        weight_decay: Of weights; biases and LayerNorms do not decay.
        adam_beta1: AdamW's first decay rate.
        adam_beta2: AdamW's second decay rate.
        max_grad_norm: Gradients are scaled down to this norm; 0: never.
        dropout: Of hidden activations and attention.
        seed: Decides weights, samples, masks and dropout.
        precision: fp32, or bf16 or fp16 products with fp32 weights, fp16's loss scaled; auto: bf16 where the device
            multiplies it natively and, on a CPU, faster.
        residual_precision: Precision of the residual stream between GEMMs in bf16. bf16 moves less memory than fp32,
            and each addition to the stream is rounded to 8 bits.
        checkpoint_layers: Layers, from the first on, whose activations are made again in the backward pass.
        shard: Each rank keeps a part of every parameter, gradient and optimizer state.
        device: Such as "cpu" or "cuda:0"; none: a GPU if there is one, under torchrun one for each process.
        dataloader_num_workers: Processes that make batches ahead of time; none: two for a GPU, else none.
        logging_steps: Steps between entries of metrics.jsonl.
        eval_steps: Steps between validations; the end of the run is one in any case.
        eval_batches: Batches to validate on.
        save_steps: Steps between checkpoints.
        save_total_limit: Checkpoints to keep, besides the one with the best validation loss.
        resume: Go on from the newest whole checkpoint in output_dir.
        sigterm_exit_code: What the program returns after a SIGTERM, for schedulers.
        cuda_graph: On one GPU, replay the step from a CUDA graph, captured after its first few times.
        deterministic: Forbid PyTorch's operations that may differ from run to run on a GPU.
        check_replay: Compute every so manieth step twice and compare the gradients' bits; 0: never.
        replay: Compute this step again from the checkpoint before it, say what it gives, and write nothing.
        tensorboard: Write metrics for TensorBoard too.
        wandb: Send metrics to Weights & Biases too.
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
    batch_ramp: float = 0.0
    second_phase_length: int = 0
    second_phase_share: float = 0.1
    max_steps: int = 0
    num_train_epochs: float = 1
    minutes: float | None = None
    optimizer: OptimizerName = "adamw"
    learning_rate: float = 1e-4
    schedule: ScheduleName = "linear"
    warmup_ratio: float = 0.01
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    max_grad_norm: float = 1.0
    dropout: float = 0.1
    seed: int = 42
    precision: Precision = "auto"
    residual_precision: ResidualPrecision = "fp32"
    checkpoint_layers: int = 0
    shard: bool = False
    device: str | None = None
    dataloader_num_workers: int | None = None
    logging_steps: int = 10
    eval_steps: int = 500
    eval_batches: int = 50
    save_steps: int = 500
    save_total_limit: int = 2
    resume: bool = False
    sigterm_exit_code: int = 143
    cuda_graph: bool = True
    deterministic: bool = False
    check_replay: int = 0
    replay: int = 0
    tensorboard: bool = False
    wandb: bool = False


def pretrain(settings: PretrainSettings, on_step: Callable[[int], None] = lambda step: None) -> dict[str, float]:
    """Do the run; `on_step` is called with the number of steps done after each. Returns the last validation's metrics.

    Leaves in `output_dir` a folder that `transformers.BertForPreTraining.from_pretrained` opens. In the processes that
    `torchrun` starts, all do the run together.
    """
    before, distributed, run = torch.are_deterministic_algorithms_enabled(), Distributed.init(settings.device), None
    try:
        run = Pretraining(settings, distributed)
        with side_stream(run.device):
            return run.replay(settings.replay) if settings.replay else run.run(on_step)
    finally:
        torch.use_deterministic_algorithms(before)
        if run is not None:  # an error holds it longer than the ranks are together, and its end would wait for them
            run.train_step = None
        distributed.destroy()


@dataclass(frozen=True, eq=False)
class PendingStep:
    """A step that was started, and where its results will be.

    Attributes:
        step: Its number, from 1.
        first_batch: The number of its first batch.
        tokens, flops: Its room for tokens, and what it must compute, of all its batches and of this rank's.
        masked, pairs: What means run over.
        rate: The learning rate.
        results: fp64 [5]: see `TrainStep.gradients`, and the norm of its gradients, NaN where it was skipped.
    """

    step: int
    first_batch: int
    tokens: int
    flops: int
    masked: int
    pairs: int
    rate: float
    results: Tensor


class Pretraining:
    """One run: what it works on, and its loop."""

    def __init__(self, settings: PretrainSettings, distributed: Distributed | None = None):
        self.settings, self.distributed = settings, distributed or Distributed.init(settings.device)
        self.device = self.distributed.device
        _check(settings)
        if settings.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.folder = Path(settings.output_dir)
        self.bins_per_step = settings.gradient_accumulation_steps * self.distributed.world_size
        # Raises early if batches cannot be shared evenly among the ranks.
        Curriculum(self.bins_per_step, self.distributed.world_size, ramp=int(settings.batch_ramp > 0))
        self.precision = choose_precision(self.device, settings.precision)
        self.saved = self.distributed.broadcast(self.distributed.run_on_main(self._checkpoint_to_resume))
        if self.saved is not None:  # where "auto" chose, it is not asked again
            self.precision = read_progress(self.saved)[1]["settings"]["precision"]
        if settings.residual_precision == "bf16" and self.precision != "bf16":
            raise ValueError(
                f"--residual-precision bf16 goes with --precision bf16, and this run's precision is {self.precision}: "
                "add --precision bf16, or leave --residual-precision out"
            )
        torch.manual_seed(settings.seed)
        start = None if settings.init_from is None else resolve(settings.init_from)
        config = initial_config(
            start,
            settings.preset,
            settings.config_overrides,
            settings.dropout,
            settings.max_positions,
            causal=settings.sampling.objective == "ltr",
        )
        longest = max(settings.sampling.max_seq_length, settings.second_phase_length)
        if longest > config.max_position_embeddings:
            raise ValueError(
                f"max_seq_length {longest} is more than the model's {config.max_position_embeddings} positions: "
                "lower it, or raise max_positions"
            )
        self._open_data(start)
        config.vocab_size = max(config.vocab_size, self.train.vocabulary_size) if start else self.train.vocabulary_size
        if self.saved is None:
            self.model = initial_model(config, start)
        else:
            self.model, _, _ = load(BertForPreTraining, self.saved, config)
        require_packed(self.model.train())
        self.model = self.model.to(self.device)
        if not settings.sampling.pairs:  # no loss reaches them
            for unused in (self.model.bert.pooler, self.model.cls.seq_relationship):
                unused.requires_grad_(False)
        layers = self.model.bert.encoder.layer
        for layer in layers[: settings.checkpoint_layers]:  # dropout is a function: there is no state to restore
            layer.gradient_checkpointing = True
            layer._gradient_checkpointing_func = partial(recomputed, use_reentrant=False, preserve_rng_state=False)
        self.memory_estimate = estimate_memory(
            self.model,
            config,
            optimizer=settings.optimizer,
            precision=self.precision,
            residual_precision=settings.residual_precision,
            tokens=settings.tokens_per_batch,
            checkpointed=settings.checkpoint_layers,
            ranks=self.distributed.world_size if settings.shard else 1,
        )
        self.memory_estimate.check(available_memory(self.device))
        self._plan_batches()
        residual_dtype = torch.bfloat16 if settings.residual_precision == "bf16" else None
        objective = self.distributed.wrap(Objective(self.model, residual_dtype), layers, settings.shard)
        betas = (settings.adam_beta1, settings.adam_beta2)
        # Several ranks meet in the backward pass, whose messages are not recorded.
        captures = (
            settings.cuda_graph
            and self.distributed.world_size == 1
            and can_capture(config, self.precision, self.device)
        )
        self.train_step = TrainStep(
            objective,
            build_optimizers(self.model, settings.optimizer, settings.learning_rate, settings.weight_decay, betas),
            self.distributed,
            precision=self.precision,
            seed=torch.tensor(settings.seed, device=self.device),
            max_grad_norm=settings.max_grad_norm,
            capture=cuda_graphs() if captures else None,
        )
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.seconds, self.validation_loss, self.loss_ema = 0.0, None, None
        if self.saved is not None:
            load_state(self.saved, self.train_step.optimizers)
            self.step, progress = read_progress(self.saved)
            self.seconds, self.skipped = progress["seconds"], progress["skipped"]
            self.validation_loss, self.loss_ema = progress["validation_loss"], progress["loss_ema"]
            if self.train_step.scaler is not None:
                self.train_step.scaler.load_state_dict(progress["scaler"])
        self.loader = self._loader()
        self.interrupt, self.stop_requested = None, False
        # A GPU is asked how steps went as rarely as they are logged: whoever asks waits for all that it was given.
        self.steps_per_read = settings.logging_steps if self.device.type == "cuda" else 1
        self.pending: list[PendingStep] = []
        self.seconds_pending = 0.0  # seconds since steps were last read

    def run(self, on_step: Callable[[int], None]) -> dict[str, float]:
        """The loop, from where the run stands to its end; the last validation's metrics."""
        settings = self.settings
        self.metrics_log = self._open_metrics_log()
        self.gemm_throughput = gemm_throughput(
            self.model.config, settings.tokens_per_batch, half(self.precision), self.device
        )
        self._announce()
        with Interrupt() as self.interrupt, self._progress_bar() as self.bar:
            while self._progress() < 1:
                started = time.perf_counter()
                self.pending.append(self._train_step(self._rate()))
                self.step += 1
                self._pass(time.perf_counter() - started)
                if self.step % self.steps_per_read == 0:
                    self._read()
                on_step(self.step)
                if self.stop_requested if self.distributed.world_size > 1 else self.interrupt.requested:
                    self._read()
                    self._save()
                    status = self.interrupt.status
                    raise RunStopped(
                        f"stopped after step {self.step}, with a checkpoint: the same command with --resume goes on",
                        settings.sigterm_exit_code if status == 143 else status,
                    )
                if self._progress() < 1:
                    if self.step % settings.eval_steps == 0:
                        self._read()
                        self._validate()
                    if self.step % settings.save_steps == 0:
                        self._read()
                        if not self.skipped_in_a_row:
                            self._save()
            self._read()
        metrics = self._validate()
        self._save()
        saved = checkpoints(self.folder / "checkpoints")[-1]
        self.distributed.run_on_main(lambda: self._finish(saved, metrics))
        return metrics

    def replay(self, step: int) -> dict[str, float]:
        """Compute step number `step`, from 1, again from where the checkpoint before it stands; nothing is written."""
        if step <= self.step:
            raise ValueError(f"the oldest checkpoint to go from is of step {self.step}: replay a later one")
        while self.step < step - 1:
            self._train_step(self._rate())
            self.step += 1
        masked, pairs = self._take_batches()
        sums = self.train_step.gradients(self.batches_of_step, masked, pairs).tolist()
        losses = {"masked_lm_loss": sums[0] / masked}
        if self.settings.sampling.pairs:
            losses["next_sentence_loss"] = sums[2] / pairs
        norms = {name: p.grad.norm().item() for name, p in self.model.named_parameters() if p.grad is not None}
        wrong = [name for name, norm in norms.items() if not math.isfinite(norm)]
        print(f"step {step}: {losses}")
        print(f"gradients that are not finite: {', '.join(wrong)}" if wrong else "all gradients are finite")
        return losses

    def _finish(self, saved: Path, metrics: dict[str, float]) -> None:
        save(load(BertForPreTraining, saved)[0] if self.settings.shard else self.model, self.folder)
        save_tokenizer(self.tokenizer, self.folder)
        if not self.metrics_log.plot(self.folder / "loss.png", unigram_entropy=metrics["unigram_entropy"]):
            print("No loss.png: that wants `pip install bertfast[plots]`.")
        print(f"Model, metrics.jsonl and checkpoints are in {self.folder}.")

    def _train_step(self, rate: float) -> PendingStep:
        """Start one step of the optimizers; what it gives is read later."""
        masked, pairs = self._take_batches()
        sums = self.train_step.gradients(self.batches_of_step, masked, pairs)
        every = self.settings.check_replay
        if every and (self.step + 1) % every == 0:
            self._compute_again(masked, pairs)
        norm = self.train_step.update(rate)
        return PendingStep(
            self.step + 1,
            self.curriculum.first(self.step),
            tokens=self.curriculum.bins(self.step) * self.settings.tokens_per_batch,
            flops=sum(step_flops(self.model.config, batch) for batch in self.batches_of_step),
            masked=masked,
            pairs=pairs,
            rate=rate,
            results=torch.cat([sums, norm.double()[None]]),
        )

    def _take_batches(self) -> tuple[int, int]:
        """Those of the next step; returns its masked tokens and pairs, those of all ranks."""
        count = self.curriculum.bins(self.step) // self.distributed.world_size
        self.batches_of_step = [self.loader.next() for _ in range(count)]
        masked = sum(batch.masked for batch in self.batches_of_step)
        pairs = sum(sum(length > 0 for length in batch.sequences.lengths) for batch in self.batches_of_step)
        requested = self.interrupt is not None and self.interrupt.requested
        counts = torch.tensor([masked, pairs, requested])
        masked, pairs, requested = self.distributed.sum(counts).tolist()
        self.stop_requested = requested > 0  # all ranks stop after the same step
        return max(masked, 1), max(pairs, 1)

    def _compute_again(self, masked: int, pairs: int) -> None:
        """Stop the run if the step does not give the same bits twice: then the machine cannot be trusted."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        before = [self.train_step.sums.clone(), *(p.grad.clone() for p in parameters)]
        self.model.zero_grad(set_to_none=not self.train_step.captures)
        again = [self.train_step.gradients(self.batches_of_step, masked, pairs), *(p.grad for p in parameters)]
        if self.distributed.any(not all(map(torch.equal, before, again))):
            raise RunStopped(
                f"step {self.step + 1} was computed twice and came out differently: this machine, or an operation on "
                f"it, cannot be trusted; the newest checkpoint in {self.folder / 'checkpoints'} is kept"
            )

    def _validate(self) -> dict[str, float]:
        def objective(batch: Batch, seed: None) -> PretrainingLoss:
            return PretrainingLoss(*self.train_step.objective(batch, seed))

        metrics = validate(self.model, self.held_out, self.precision, objective, self.distributed)
        metrics |= {"unigram_entropy": self.unigram_entropy}
        self.validation_loss = metrics["validation_loss"]
        self._write(step=self.step, seconds=round(self.seconds, 3), **metrics)
        self._say(
            f"step {self.step}: validation loss {metrics['validation_loss']:.3f} (words alone: "
            f"{self.unigram_entropy:.3f}), {metrics['validation_accuracy']:.1%} of the blanks right, "
            f"perplexity {metrics['validation_perplexity']:.1f}"
            + (f", pairs {metrics['next_sentence_accuracy']:.1%} right" if "next_sentence_accuracy" in metrics else "")
        )
        return metrics

    def _save(self) -> None:
        scaler = self.train_step.scaler
        progress = {
            "seconds": self.seconds,
            "skipped": self.skipped,
            "validation_loss": self.validation_loss,
            "loss_ema": self.loss_ema,
            "scaler": scaler and scaler.state_dict(),
            "settings": self._settings_that_matter(),
        }
        keep = self.settings.save_total_limit
        save_state(
            self.folder / "checkpoints",
            self.step,
            self.model,
            self.train_step.optimizers,
            progress,
            keep,
            self.distributed,
        )

    def _checkpoint_to_resume(self) -> Path | None:
        folder = self.folder / "checkpoints"
        saved = checkpoints(folder)
        if self.settings.replay:
            earlier = [path for path in saved if read_progress(path)[0] < self.settings.replay]
            if not earlier:
                raise ValueError(f"{folder} holds no checkpoint of a step before {self.settings.replay}")
            return earlier[-1]
        if not self.settings.resume:
            if saved:
                raise ValueError(f"{folder} already holds a run: add --resume to go on with it, or name another folder")
            return None
        if not saved:
            return None  # stopped before its first checkpoint: it begins again
        newest = newest_whole(folder)
        if newest is None:
            raise ValueError(f"every checkpoint in {folder} is damaged: begin the run again in another folder")
        before, now = read_progress(newest)[1]["settings"], self._settings_that_matter()
        if self.settings.precision == "auto":
            now["precision"] = before["precision"]
        changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"the run in {self.folder} was made with other settings ({', '.join(changed)}): "
                "repeat its command to resume it"
            )
        return newest

    def _settings_that_matter(self) -> dict:
        values = {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in _MAY_CHANGE}
        return values | {"bins_per_step": self.bins_per_step, "precision": self.precision}

    def _open_data(self, start: Path | None) -> None:
        settings = self.settings
        if settings.data_dir is None:
            corpus = settings.corpus
            if start is not None and corpus.tokenizer_name is None:
                corpus = dataclasses.replace(corpus, tokenizer_name=str(start))
            data = self.folder / "data"
            self.distributed.run_on_main(lambda: prepare(PrepareSettings(str(data), corpus)))
        else:
            data = Path(settings.data_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = load_tokenizer(data)
        if start is not None and tokenizer_hash(load_tokenizer(start)) != tokenizer_hash(self.tokenizer):
            raise ValueError(f"the text in {data} was made tokens with another tokenizer than that of {start}")
        self.train, self.validation = (
            Shards.open(data / split, tokenizer_hash(self.tokenizer)) for split in ("train", "validation")
        )
        if not self.validation.documents:
            raise ValueError(f"{data} holds no text to validate on: raise validation_split_percentage")

    def _plan_batches(self) -> None:
        settings = self.settings
        self.batches = self._batches(self.train, settings.sampling, self.bins_per_step)
        self.steps = settings.max_steps or math.ceil(settings.num_train_epochs * self.batches.steps_per_epoch)
        self.second, second_phase = None, None
        if settings.second_phase_length:
            second_phase = round((1 - settings.second_phase_share) * self.steps)
            longer = dataclasses.replace(settings.sampling, max_seq_length=settings.second_phase_length)
            self.second = self._batches(self.train, longer, self.bins_per_step)
        self.curriculum = Curriculum(
            self.bins_per_step, self.distributed.world_size, round(settings.batch_ramp * self.steps), second_phase
        )
        self.held_out = list(self._batches(self.validation, settings.sampling, 1).first_epoch(settings.eval_batches))
        self.unigram_entropy = unigram_entropy(self.train, self.held_out)

    def _batches(self, shards: Shards, sampling: Sampling, bins_per_step: int) -> Batches:
        return Batches(
            shards,
            special_tokens(self.tokenizer),
            continuation_tokens(self.tokenizer),
            sampling,
            tokens_per_bin=self.settings.tokens_per_batch,
            bins_per_step=bins_per_step,
            seed=self.settings.seed,
        )

    def _loader(self) -> Loader:
        workers = self.settings.dataloader_num_workers
        if workers is None:
            workers = 2 if self.device.type == "cuda" else 0
        places = partial(_places, self.curriculum, self.step, self.distributed.rank)
        return Loader(partial(_batch_at, self.batches, self.second), places, workers, self.device.type == "cuda")

    def _progress(self) -> float:
        """Share of the run that is done: of its steps, or of its minutes."""
        if self.settings.minutes is not None:
            return self.seconds / (60 * self.settings.minutes)
        return self.step / self.steps

    def _rate(self) -> float:
        """The learning rate of the next step."""
        settings = self.settings
        return settings.learning_rate * schedule(settings.schedule, self._progress(), settings.warmup_ratio)

    def _open_metrics_log(self) -> MetricsLog | None:
        settings, writers = self.settings, []
        if not self.distributed.is_main:
            return None
        if settings.tensorboard:
            writers.append(tensorboard(self.folder))
        if settings.wandb:
            writers.append(wandb(self.folder, dataclasses.asdict(settings)))
        return MetricsLog(self.folder, steps_done=self.step, writers=writers)

    def _write(self, **entry) -> None:
        if self.metrics_log is not None:
            self.metrics_log.write(**entry)

    def _say(self, text: str) -> None:
        if self.distributed.is_main:
            tqdm.write(text)

    def _announce(self) -> None:
        config, parameters = self.model.config, sum(p.numel() for p in self.model.parameters())
        where = f"{self.precision} on {self.device}" + (
            f", {self.distributed.world_size} ranks" if self.distributed.world_size > 1 else ""
        )
        self._say(
            f"{parameters / 1e6:.1f} M parameters ({config.num_hidden_layers} layers, {config.hidden_size} wide), "
            f"{self.train.tokens / 1e6:.1f} M tokens in {self.train.documents} documents, "
            f"{self.bins_per_step * self.settings.tokens_per_batch} tokens a step, {where}"
            + (f", from step {self.step}" if self.step else "")
        )
        self._say(f"{self.memory_estimate}; products run at {self.gemm_throughput / 1e12:.3g} TFLOP/s")

    def _progress_bar(self) -> tqdm:
        options = {"desc": "pre-training", "disable": not self.distributed.is_main}
        if self.settings.minutes is None:
            return tqdm(total=self.steps, initial=self.step, unit="step", **options)
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
        return tqdm(total=self.settings.minutes * 60, initial=self.seconds, bar_format=form, **options)

    def _pass(self, seconds: float) -> None:
        """Time has passed with training."""
        self.seconds += seconds
        self.seconds_pending += seconds
        if self.settings.minutes is not None:
            self.seconds = self.distributed.broadcast(self.seconds)
            self.bar.update(min(seconds, self.bar.total - self.bar.n))

    def _read(self) -> None:
        """Wait for the steps that were started, and report what they gave."""
        if not self.pending:
            return
        started = time.perf_counter()
        results = torch.stack([done.results for done in self.pending]).tolist()
        self._pass(time.perf_counter() - started)
        steps, self.pending = self.pending, []
        share = self.seconds_pending / len(steps)
        self.seconds_pending, waited, self.loader.waited = 0.0, self.loader.waited / len(steps), 0.0
        for done, values in zip(steps, results, strict=True):
            self._report(done, values, share, waited)

    def _report(self, done: PendingStep, results: list[float], seconds: float, waited: float) -> None:
        """A step's results, and the seconds it took, `waited` of them for batches."""
        if self.settings.minutes is None:
            self.bar.update()
        masked_lm, correct, next_sentence, next_correct, norm = results
        if not math.isfinite(norm):
            self.skipped += 1
            self.skipped_in_a_row += 1
            self._say(
                f"step {done.step}: {not_finite(masked_lm + next_sentence, self.device)}; skipped "
                f"({self.skipped} so far); --replay {done.step} computes it again"
            )
            self._write(step=done.step, skipped=self.skipped, first_batch=done.first_batch)
            if self.skipped_in_a_row == SKIPS_IN_A_ROW:
                raise RunStopped(
                    f"{SKIPS_IN_A_ROW} steps in a row had no finite loss and gradient: lower the learning rate; "
                    f"the newest checkpoint in {self.folder / 'checkpoints'} is kept"
                )
            return
        self.skipped_in_a_row = 0
        loss, flops = masked_lm / done.masked, done.flops / seconds
        self.bar.set_postfix(
            loss=f"{loss:.3f}",
            tokens_per_second=f"{done.tokens / seconds:.0f}",
            tflops=f"{flops / 1e12:.3g}",
            gemm_efficiency=f"{flops / self.gemm_throughput:.0%}",
        )
        spike = self.loss_ema is not None and loss > self.loss_ema + SPIKE_THRESHOLD
        self.loss_ema = loss * (1 - LOSS_EMA_DECAY) + LOSS_EMA_DECAY * (self.loss_ema or loss)
        if done.step % self.settings.logging_steps == 0 or spike:
            pairs = {"next_sentence_loss": next_sentence, "next_sentence_accuracy": next_correct}
            self._write(
                step=done.step,
                seconds=round(self.seconds, 3),
                learning_rate=done.rate,
                tokens_per_second=round(done.tokens / seconds, 1),
                tflops=round(flops / 1e12, 4),
                gemm_efficiency=round(flops / self.gemm_throughput, 4),
                waited_for_batches=round(waited / seconds, 4),
                **({"spike": True} if spike else {}),
                masked_lm_loss=loss,
                masked_lm_accuracy=correct / done.masked,
                **({name: value / done.pairs for name, value in pairs.items()} if self.settings.sampling.pairs else {}),
                gradient_norm=norm,
            )


def _places(curriculum: Curriculum, step: int, rank: int) -> Iterator[tuple[int, int]]:
    """(phase, bin) of a rank's batches from a step on, without end."""
    return itertools.chain.from_iterable(curriculum.places(number, rank) for number in itertools.count(step))


def _batch_at(first: Batches, second: Batches | None, place: tuple[int, int]) -> Batch:
    phase, number = place
    return (second if phase else first).numbered(number)


def _check(settings: PretrainSettings) -> None:
    """What settings mean together."""
    if settings.minutes is not None and (settings.batch_ramp or settings.second_phase_length):
        raise ValueError(
            "batch_ramp and second_phase_length go with steps or epochs: with minutes the end is not known"
        )
    if settings.shard and settings.optimizer != "adamw":
        raise ValueError(f"shard goes with adamw: {settings.optimizer} needs whole matrices on each rank")
    if not 0 <= settings.batch_ramp <= 1 or not 0 < settings.second_phase_share < 1:
        raise ValueError("batch_ramp is from 0 to 1 and second_phase_share between them: they are shares of the run")
    if settings.gradient_accumulation_steps < 1:
        raise ValueError(f"gradient_accumulation_steps is at least 1, got {settings.gradient_accumulation_steps}")
