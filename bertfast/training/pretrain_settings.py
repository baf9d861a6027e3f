"""Settings of `bertfast pretrain`, by subject."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from bertfast.architectures import BERT, family_by_type
from bertfast.architectures.presets import ArchitectureName, Preset
from bertfast.data.prepare_settings import VOCABULARY_FLAGS, CorpusSettings
from bertfast.data.samples import Sampling
from bertfast.runtime.precision import Precision, ResidualPrecision
from bertfast.runtime.settings import (
    Count,
    CountOrOff,
    Epochs,
    Fraction,
    LearningRate,
    NonNegative,
    Positive,
    Range,
    Seed,
    Settings,
    given,
    refuse_without_effect,
    settings_of,
)
from bertfast.training.checkpoint_settings import CheckpointSettings
from bertfast.training.optimizer import OptimizerName
from bertfast.training.report_settings import MetricsWriterSettings
from bertfast.training.schedule import ScheduleName

# Settings that may differ between a run and its continuation: where it computes and how often it reports. The number
# of batches per step must stay the same, but not how they are divided among ranks. Text and tokenizer must stay the
# same, but not the flags that name them: `Corpus.hashes` are compared, and the files of the initial model.
RESUME_MAY_CHANGE = (
    "output_dir",
    "data_dir",
    *settings_of(CorpusSettings),
    "init_from",
    "resume",
    "overwrite_output_dir",
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


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Model that is pre-trained.

    Attributes:
        architecture: Family of a model with random weights. bert is trained as BertForPreTraining, the other families
            without sentence pairs as their masked-LM models; that of electra, ElectraForMaskedLM, is its generator: the
            discriminator is not trained.
        preset: Published model size. Excludes --init-from.
        config_overrides: Changes to the model configuration, such as "num_hidden_layers=2,hidden_size=256".
        init_from: Model to start from (folder or hub id). If not given: random weights. Excludes --preset; given after
            --config, it overrides the file's value.
        max_positions: Number of tokens that a sequence may have; the positions of a smaller checkpoint are extended to
            it. If not given: as in the model's configuration.
        dropout: Dropout probability of hidden activations and attention weights. If not given: as in the configuration
            of --init-from; with random weights 0.1.
        rope_theta: Base of the angles of rotary positions, in layers without a window. If not given: as in the model's
            configuration.
    """

    exclusive = ("preset", "init_from")

    architecture: ArchitectureName = "bert"
    preset: Preset = "small"
    config_overrides: str = ""
    init_from: str | None = None
    max_positions: Count | None = None
    dropout: Annotated[float, Range(0, below=1)] | None = None
    rope_theta: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Size of the batches over the course of the run.

    Attributes:
        tokens_per_batch: Token budget of one forward and backward pass.
        gradient_accumulation_steps: Batches per rank and optimizer step.
        batch_ramp: Fraction of the run in which a step takes a quarter, then half of its batches (0 = off).
        second_phase_length: Maximum sequence length, in tokens, of a second phase at the end of the run (0 = off).
        second_phase_share: Fraction of the run's steps that are in the second phase.
        second_phase_rope_theta: Like --rope-theta, in the second phase. If not given: as in the first.
    """

    tokens_per_batch: Count = 4096
    gradient_accumulation_steps: Count = 1
    batch_ramp: Fraction = 0.0
    second_phase_length: CountOrOff = 0
    second_phase_share: Annotated[float, Range(above=0, below=1)] = 0.1
    second_phase_rope_theta: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class DurationSettings(Settings):
    """Length of the run: in steps, epochs or minutes. If not given: one epoch.

    Attributes:
        max_steps: Number of optimizer steps (0 = off). Excludes --num-train-epochs and --minutes; given after --config,
            it overrides the file's values.
        num_train_epochs: Number of passes over the training data. Excludes --max-steps and --minutes; given after
            --config, it overrides the file's values.
        minutes: Length of the run in minutes; the learning rate reaches 0 at its end. Excludes --max-steps and
            --num-train-epochs; given after --config, it overrides the file's values.
    """

    exclusive = ("max_steps", "num_train_epochs", "minutes")

    max_steps: CountOrOff = 0
    num_train_epochs: Epochs | None = None
    minutes: Positive | None = None


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """Optimizer and learning rate.

    Attributes:
        optimizer: adamw: AdamW as in the BERT paper; lamb: LAMB, for large batches; muon: Muon for matrices and AdamW
            for all other parameters.
        learning_rate: Peak learning rate.
        schedule: Decay of the learning rate to 0 after warm-up: linear, cosine, or constant until a linear decay in the
            last fifth of the run (wsd).
        warmup_ratio: Fraction of the run in which the learning rate rises to its peak.
        weight_decay: Weight decay of matrices; biases and LayerNorm parameters do not decay.
        adam_beta1: AdamW β1.
        adam_beta2: AdamW β2.
        max_grad_norm: Gradient-clipping norm (0 = off).
    """

    optimizer: OptimizerName = "adamw"
    learning_rate: LearningRate = 1e-4
    schedule: ScheduleName = "linear"
    warmup_ratio: Fraction = 0.01
    weight_decay: NonNegative = 0.01
    adam_beta1: Annotated[float, Range(0, below=1)] = 0.9
    adam_beta2: Annotated[float, Range(0, below=1)] = 0.999
    max_grad_norm: NonNegative = 1.0


@dataclass(frozen=True, kw_only=True)
class ComputeSettings(Settings):
    """Device, precision and use of memory.

    Attributes:
        device: Device such as "cpu" or "cuda:0". If not given: a GPU if one is available, under torchrun one per
            process.
        precision: fp32, or bf16 or fp16 GEMMs with fp32 weights (fp16 scales the loss); auto: bf16 if the device has
            native bf16 GEMMs and, on a CPU, is faster with them.
        residual_precision: Precision of the residual stream between GEMMs in bf16. bf16 moves less memory than fp32,
            and each addition to the stream is rounded to 8 bits.
        checkpoint_layers: Number of layers, counted from the first, whose activations are recomputed in the backward
            pass.
        shard: Shard parameters, gradients and optimizer state over the ranks (FSDP2).
        dataloader_num_workers: Worker processes that prepare batches. If not given: two with a GPU, otherwise zero.
        cuda_graph: Capture the step in a CUDA graph after its warm-up calls and replay it (one GPU only).
        deterministic: Forbid PyTorch operations that are not deterministic on a GPU.
    """

    device: str | None = None
    precision: Precision = "auto"
    residual_precision: ResidualPrecision = "fp32"
    checkpoint_layers: CountOrOff = 0
    shard: bool = False
    dataloader_num_workers: CountOrOff | None = None
    cuda_graph: bool = True
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportSettings(MetricsWriterSettings):
    """Validation and metrics.

    Attributes:
        logging_steps: Steps between entries of metrics.jsonl.
        eval_steps: Steps between validations; the end of the run is always validated.
        eval_batches: Maximum number of validation batches.
    """

    logging_steps: Count = 10
    eval_steps: Count = 500
    eval_batches: Count = 50


@dataclass(frozen=True, kw_only=True)
class PretrainCheckpointSettings(CheckpointSettings):
    """Checkpoints, resuming and replaying.

    Attributes:
        save_total_limit: Number of newest checkpoints to keep, in addition to the one with the best validation loss.
        check_replay: Interval, in steps, at which a step is computed twice and its gradients compared bitwise (0 =
            off).
        replay: Step to recompute from the checkpoint before it, printing its losses and writing nothing (0 = off).
    """

    check_replay: CountOrOff = 0
    replay: CountOrOff = 0


@dataclass(frozen=True, kw_only=True)
class PretrainSettings(Settings):
    """Settings of a pre-training run.

    Attributes:
        output_dir: Output folder for the model, checkpoints, metrics.jsonl and loss.png.
        data_dir: Folder written by `bertfast prepare`. If not given: the text is prepared first, in the folder data of
            --output-dir.
        overwrite_output_dir: Replace the run or the model in --output-dir.
        seed: Random seed of initial weights, samples, masks and dropout.
        corpus: Text of the corpus, and its tokenizer.
        sampling: Length, objective and masking of samples.
        model: Model that is pre-trained.
        batch: Size of the batches over the course of the run.
        duration: Length of the run.
        optimizer: Optimizer and learning rate.
        compute: Device, precision and use of memory.
        report: Validation and metrics.
        checkpoint: Checkpoints, resuming and replaying.
    """

    output_dir: str
    data_dir: str | None = None
    overwrite_output_dir: bool = False
    seed: Seed = 42
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    sampling: Sampling = field(default_factory=Sampling)
    model: ModelSettings = field(default_factory=ModelSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    duration: DurationSettings = field(default_factory=DurationSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    report: ReportSettings = field(default_factory=ReportSettings)
    checkpoint: PretrainCheckpointSettings = field(default_factory=PretrainCheckpointSettings)

    def validate(self) -> None:
        if self.overwrite_output_dir and (self.checkpoint.resume or self.checkpoint.replay):
            raise ValueError("--overwrite-output-dir removes the run that --resume and --replay need: leave one out")
        if 0 < self.batch.second_phase_length < 5:
            raise ValueError(
                f"--second-phase-length must be 0 (off) or at least 5, got {self.batch.second_phase_length}"
            )
        if self.data_dir is not None:
            refuse_without_effect(given(self.corpus), "--data-dir holds text that is already prepared")
        if self.model.init_from is not None:
            refuse_without_effect(
                sorted(VOCABULARY_FLAGS.intersection(given(self.corpus))), "the model of --init-from has a vocabulary"
            )
            refuse_without_effect(
                {"--architecture"}.intersection(given(self.model)), "that of --init-from has an architecture"
            )
        elif family_by_type(self.model.architecture) is not None:  # else this version of transformers lacks it
            check_rope_theta(self, self.model.architecture)
        if not self.batch.second_phase_length:
            refuse_without_effect(
                sorted({"--second-phase-share", "--second-phase-rope-theta"}.intersection(given(self.batch))),
                "there is no --second-phase-length",
            )
        if self.duration.minutes is not None and (self.batch.batch_ramp or self.batch.second_phase_length):
            raise ValueError(
                "--batch-ramp and --second-phase-length cannot be combined with --minutes, which leaves the number of "
                "steps open: use --max-steps or --num-train-epochs, or type --batch-ramp 0 --second-phase-length 0"
            )
        if self.compute.shard and self.optimizer.optimizer != "adamw":
            raise ValueError(
                f"--shard requires --optimizer adamw: {self.optimizer.optimizer} needs whole matrices on every rank"
            )


def resolve_objective(settings: PretrainSettings, model_type: str) -> PretrainSettings:
    """Return settings in which a family's own objective replaces auto.

    Args:
        settings: Settings of the run.
        model_type: That of the model's configuration.

    Raises:
        ValueError: The family has no head for the objective.
    """
    architecture = family_by_type(model_type) or BERT
    objective = settings.sampling.objective
    if objective == "auto":
        return settings.replace(objective="mlm+nsp" if architecture.has_next_sentence else "mlm")
    if objective != "mlm" and architecture is not BERT:
        raise ValueError(f"--objective {objective} is for BERT, and the model is a {model_type}: use --objective mlm")
    return settings


def check_rope_theta(settings: PretrainSettings, model_type: str) -> None:
    """Raise ValueError if a base of rotary positions is given for a model that has none.

    Args:
        settings: Settings of the run.
        model_type: That of the model's configuration.
    """
    given_bases = {
        "--rope-theta": settings.model.rope_theta,
        "--second-phase-rope-theta": settings.batch.second_phase_rope_theta,
    }
    if (family_by_type(model_type) or BERT).rotary is None:
        refuse_without_effect(
            [name for name, theta in given_bases.items() if theta is not None],
            f"a {model_type} model has no rotary positions; leave them out, or type None for those of a recipe, as in "
            "--rope-theta None",
        )


def check_sizes(settings: PretrainSettings, positions: int, layers: int) -> None:
    """Raise ValueError if a model or a batch cannot hold the sequences of a phase, or layers to recompute are missing.

    Args:
        settings: Settings of the run.
        positions: The model's number of positions.
        layers: Its number of layers.
    """
    recomputed = settings.compute.checkpoint_layers
    if recomputed > layers:
        raise ValueError(f"--checkpoint-layers must be at most {layers}, as many as the model has, got {recomputed}")
    lengths = {
        "--max-seq-length": settings.sampling.max_seq_length,
        "--second-phase-length": settings.batch.second_phase_length,
    }
    longest = max(lengths, key=lengths.__getitem__)
    if lengths[longest] > positions:
        raise ValueError(
            f"{longest} {lengths[longest]} is more than the model's {positions} positions: lower it, or raise "
            "--max-positions"
        )
    if lengths[longest] > settings.batch.tokens_per_batch:
        raise ValueError(
            f"--tokens-per-batch {settings.batch.tokens_per_batch} cannot hold a sample of {longest} "
            f"{lengths[longest]}: raise --tokens-per-batch, or lower {longest}"
        )
