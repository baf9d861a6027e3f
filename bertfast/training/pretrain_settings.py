"""Settings of `bertfast pretrain`."""

from __future__ import annotations

from dataclasses import dataclass, field

from bertfast.data.prepare import CorpusSettings
from bertfast.data.samples import Sampling
from bertfast.models.presets import Preset
from bertfast.runtime.precision import Precision, ResidualPrecision
from bertfast.training.optimizer import OptimizerName
from bertfast.training.schedule import ScheduleName

# Settings that may differ between a run and its continuation: where it computes and how often it reports. The number
# of batches per step must stay the same, but not how they are divided among ranks.
RESUME_MAY_CHANGE = (
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


@dataclass
class PretrainSettings:
    """Settings of a pre-training run.

    Attributes:
        output_dir: Output folder for the model, checkpoints, metrics.jsonl and loss.png.
        data_dir: Folder written by `bertfast prepare`; none: the text is prepared in output_dir/data first.
        corpus: Text of the corpus and how it is tokenised.
        sampling: How samples are cut from documents and masked.
        preset: Published model size.
        config_overrides: Changes to the model configuration, such as "num_hidden_layers=2,hidden_size=256".
        init_from: Model to start from (folder or hub id); none: random weights.
        max_positions: Number of position embeddings; the positions of a smaller checkpoint are extended to it.
        tokens_per_batch: Token budget of one forward and backward pass.
        gradient_accumulation_steps: Batches per rank and optimizer step.
        batch_ramp: Fraction of the run in which a step takes a quarter, then half of its batches (0 = off).
        second_phase_length: Maximum sequence length, in tokens, of a second phase at the end of the run (0 = off).
        second_phase_share: Fraction of the run's steps that are in the second phase.
        max_steps: Number of optimizer steps; 0: as many as num_train_epochs need.
        num_train_epochs: Number of passes over the documents.
        minutes: Length of the run in minutes instead of steps; the learning rate reaches 0 at its end.
        optimizer: AdamW as in the paper, LAMB for large batches, or Muon for matrices and AdamW for the rest.
        learning_rate: Peak learning rate.
        schedule: Decay of the learning rate to 0 after warm-up: linear, cosine, or constant until a linear decay in the
            last fifth of the run (wsd).
        warmup_ratio: Fraction of the run in which the learning rate rises to its peak.
        weight_decay: Weight decay of matrices; biases and LayerNorm parameters do not decay.
        adam_beta1: AdamW β1.
        adam_beta2: AdamW β2.
        max_grad_norm: Gradient-clipping norm (0 = off).
        dropout: Dropout probability of hidden activations and attention weights.
        seed: Random seed of initial weights, samples, masks and dropout.
        precision: fp32, or bf16 or fp16 GEMMs with fp32 weights (fp16 scales the loss); auto: bf16 if the device has
            native bf16 GEMMs and, on a CPU, is faster with them.
        residual_precision: Precision of the residual stream between GEMMs in bf16. bf16 moves less memory than fp32,
            and each addition to the stream is rounded to 8 bits.
        checkpoint_layers: Number of layers, counted from the first, whose activations are recomputed in the backward
            pass.
        shard: Shard parameters, gradients and optimizer state over the ranks (FSDP2).
        device: Device such as "cpu" or "cuda:0"; none: a GPU if available, under torchrun one per process.
        dataloader_num_workers: Worker processes that prepare batches; none: two with a GPU, otherwise zero.
        logging_steps: Steps between entries of metrics.jsonl.
        eval_steps: Steps between validations; the end of the run is always validated.
        eval_batches: Number of validation batches.
        save_steps: Steps between checkpoints.
        save_total_limit: Number of newest checkpoints to keep, in addition to the one with the best validation loss.
        resume: Resume from the newest intact checkpoint in output_dir.
        sigterm_exit_code: Exit code after SIGTERM, for schedulers.
        cuda_graph: Capture the step in a CUDA graph after its warm-up calls and replay it (one GPU only).
        deterministic: Forbid PyTorch operations that are not deterministic on a GPU.
        check_replay: Interval, in steps, at which a step is computed twice and its gradients compared bitwise (0 =
            off).
        replay: Step to recompute from the checkpoint before it; prints the losses and writes nothing (0 = off).
        tensorboard: Also write metrics for TensorBoard.
        wandb: Also send metrics to Weights & Biases.
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


def check_settings(settings: PretrainSettings) -> None:
    """Raise ValueError if settings contradict each other or are out of range."""
    if settings.minutes is not None and (settings.batch_ramp or settings.second_phase_length):
        raise ValueError(
            "--batch-ramp and --second-phase-length cannot be combined with --minutes, which leaves the number of "
            "steps open: use --max-steps or --num-train-epochs"
        )
    if settings.shard and settings.optimizer != "adamw":
        raise ValueError(f"--shard requires --optimizer adamw: {settings.optimizer} needs whole matrices on every rank")
    if not 0 <= settings.batch_ramp <= 1:
        raise ValueError(f"--batch-ramp is a fraction of the run from 0 to 1, got {settings.batch_ramp}")
    if not 0 < settings.second_phase_share < 1:
        raise ValueError(
            f"--second-phase-share is a fraction of the run between 0 and 1, got {settings.second_phase_share}"
        )
    if settings.gradient_accumulation_steps < 1:
        raise ValueError(
            f"--gradient-accumulation-steps must be at least 1, got {settings.gradient_accumulation_steps}"
        )


def check_positions(settings: PretrainSettings, positions: int) -> None:
    """Raise ValueError if sequences of either phase are longer than the model's number of positions."""
    lengths = {
        "--max-seq-length": settings.sampling.max_seq_length,
        "--second-phase-length": settings.second_phase_length,
    }
    flag = max(lengths, key=lengths.__getitem__)
    if lengths[flag] > positions:
        raise ValueError(
            f"{flag} {lengths[flag]} is more than the model's {positions} positions: lower it, or raise --max-positions"
        )
