"""Settings of `bertfast finetune`, by subject."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Annotated, Literal

from bertfast.models.adapters import ALL_LINEAR
from bertfast.models.extensions import LAYERS
from bertfast.runtime.settings import (
    Count,
    CountOrOff,
    Epochs,
    Fraction,
    LearningRate,
    NonNegative,
    Range,
    Seed,
    Settings,
    given,
    refuse_repeated,
    refuse_without_effect,
)
from bertfast.tasks.settings import FloatingPointSettings, TaskSettings
from bertfast.training.checkpoint_settings import CheckpointSettings
from bertfast.training.optimizer import OptimizerName
from bertfast.training.report_settings import MetricsWriterSettings
from bertfast.training.schedule import SchedulerType

logger = logging.getLogger("bertfast")


@dataclass(frozen=True, kw_only=True)
class InitialModelSettings(Settings):
    """Model that is fine-tuned.

    Attributes:
        random_init: Use only configuration and tokenizer of the model, with random weights.
        init_from_task: Model fine-tuned on another task whose encoder to start from, such as MNLI for RTE; its head is
            not used. If not given: start from --model-name-or-path.
        bilstm: Put a BiLSTM of two layers, as wide as the model, between the encoder and the head.
        dropout: Dropout probability of hidden activations and attention weights. If not given: that of the model.
    """

    exclusive = ("random_init", "init_from_task")

    random_init: bool = False
    init_from_task: str | None = None
    bilstm: bool = False
    dropout: Annotated[float, Range(0, below=1)] | None = None


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Settings):
    """Training of low-rank updates (LoRA) and the head, with peft, while the model's own weights are frozen.

    Attributes:
        lora_rank: Rank of the updates of LoRA; the output is an adapter for peft. If not given: the whole model is
            trained.
        lora_alpha: Scale of the updates, which are multiplied by alpha / rank. If not given: twice the rank.
        lora_dropout: Dropout probability of the inputs of the updates.
        lora_target_modules: Names of the linear layers that get an update, or all-linear for all in the encoder's
            layers. If not given: those of queries and values.
        lora_merge: Save a whole model, into which the updates are merged, and not an adapter.
    """

    lora_rank: Annotated[int, Range(1, 2**16)] | None = None
    lora_alpha: Annotated[float, Range(above=0)] | None = None
    lora_dropout: Annotated[float, Range(0, below=1)] = 0.0
    lora_target_modules: list[str] = field(default_factory=list)
    lora_merge: bool = False

    def validate(self) -> None:
        refuse_repeated("lora_target_modules", self.lora_target_modules)
        if ALL_LINEAR in self.lora_target_modules and len(self.lora_target_modules) > 1:
            others = " ".join(name for name in self.lora_target_modules if name != ALL_LINEAR)
            raise ValueError(
                f"--lora-target-modules {ALL_LINEAR} already includes every linear layer: leave out {others}, or give "
                f"{others} without {ALL_LINEAR}"
            )
        if self.lora_rank is None:
            refuse_without_effect(given(self), "there is no --lora-rank")


@dataclass(frozen=True, kw_only=True)
class FeatureBasedSettings(Settings):
    """Fine-tuning of the whole model, or training of a BiLSTM on its layers.

    Attributes:
        strategy: fine-tuning: train the whole model; feature-based: freeze the encoder and train a BiLSTM on its
            hidden states (token classification only).
        feature_layers: With --strategy feature-based, hidden states to use: embeddings, second-to-last, last,
            mean-last-four, concat-last-four or mean-all; means have learned weights.
        lstm_size: Hidden size of each direction of the feature-based BiLSTM.
        lstm_layers: Number of layers of the feature-based BiLSTM.
        features_dir: With --strategy feature-based, folder that keeps the hidden states, which are reused for the same
            encoder and text. If not given: a temporary folder.
    """

    strategy: Literal["fine-tuning", "feature-based"] = "fine-tuning"
    feature_layers: str = "concat-last-four"
    lstm_size: Annotated[int, Range(1, 2**16)] = 768
    lstm_layers: Annotated[int, Range(1, 64)] = 2
    features_dir: str | None = None

    def validate(self) -> None:
        if self.feature_layers not in LAYERS:
            raise ValueError(f"--feature-layers must be one of {', '.join(LAYERS)}, got {self.feature_layers!r}")


@dataclass(frozen=True, kw_only=True)
class BatchSettings(Settings):
    """Division of the examples of a step.

    Attributes:
        gradient_accumulation_steps: Passes per optimizer step.
        tokens_per_batch: Token limit of a pass; a longer one is divided, with the same result.
    """

    gradient_accumulation_steps: Count = 1
    tokens_per_batch: Count = 16_384


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings(Settings):
    """Loss and optimizer.

    Attributes:
        optimizer: adamw: AdamW as in the BERT paper; lamb: LAMB, for large batches; muon: Muon for matrices and AdamW
            for all other parameters.
        lr_scheduler_type: Learning rate after the warm-up: linear or cosine decay to 0, constant_with_warmup, constant
            until a linear decay in the last fifth of the run (wsd), or constant from the first step on.
        warmup_ratio: Fraction of the run in which the learning rate rises to its peak.
        warmup_steps: Steps in which the learning rate rises to its peak. If not given: --warmup-ratio of the run.
        layerwise_lr_decay: Factor of the learning rate from each layer to the one below it; that of the head is 1.
        weight_decay: Weight decay of matrices; biases and LayerNorm parameters do not decay.
        adam_beta1: AdamW β1.
        adam_beta2: AdamW β2.
        max_grad_norm: Gradient-clipping norm (0 = off).
        label_smoothing_factor: Fraction of the target that all labels share equally, in the training loss.
        class_weights: none: all examples have the same weight; balanced: each example is weighted inversely to the
            frequency of its label.
    """

    exclusive = ("warmup_ratio", "warmup_steps")

    optimizer: OptimizerName = "adamw"
    lr_scheduler_type: SchedulerType = "linear"
    warmup_ratio: Fraction = 0.1
    warmup_steps: CountOrOff | None = None
    layerwise_lr_decay: Annotated[float, Range(above=0, maximum=1)] = 1.0
    weight_decay: NonNegative = 0.01
    adam_beta1: Annotated[float, Range(0, below=1)] = 0.9
    adam_beta2: Annotated[float, Range(0, below=1)] = 0.999
    max_grad_norm: NonNegative = 1.0
    label_smoothing_factor: Annotated[float, Range(0, below=1)] = 0.0
    class_weights: Literal["none", "balanced"] = "none"

    def validate(self) -> None:
        if self.lr_scheduler_type == "constant":
            flags = {"--warmup-ratio", "--warmup-steps"}.intersection(given(self))
            refuse_without_effect(sorted(flags), "--lr-scheduler-type constant has no warm-up")


@dataclass(frozen=True, kw_only=True)
class SampleSettings(Settings):
    """Parts of the data, for quick trials.

    Attributes:
        max_train_samples: Use only this number of examples, the first, of --train-file; its labels are those of all. In
            lists of documents, each document counts.
        max_eval_samples: Use only this number of examples, the first, of --validation-file.
        max_predict_samples: Use only this number of examples, the first, of --test-file.
    """

    max_train_samples: Count | None = None
    max_eval_samples: Count | None = None
    max_predict_samples: Count | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings(Settings):
    """Validation, choice of the best model, and metrics.

    Attributes:
        eval_steps: Steps between validations. If not given: once per epoch.
        metric_for_best_model: Metric that selects the best model. If not given: the task's first.
        early_stopping_patience: Stop after this many validations in a row without improvement. If not given: never.
        logging_steps: Steps between entries of metrics.jsonl.
    """

    eval_steps: Count | None = None
    metric_for_best_model: str | None = None
    early_stopping_patience: Count | None = None
    logging_steps: Count = 10


@dataclass(frozen=True, kw_only=True)
class Hyperparameters(Settings):
    """Hyperparameters that the BERT paper varies between tasks; `bertfast sweep` tries several values of each.

    Attributes:
        learning_rate: Peak learning rate.
        per_device_train_batch_size: Examples per forward and backward pass.
        num_train_epochs: Number of passes over the training data.
        max_steps: Number of optimizer steps. If not given: those of --num-train-epochs.
        seed: Random seed of new weights, the order of examples and dropout.
    """

    exclusive = ("num_train_epochs", "max_steps")

    learning_rate: LearningRate = 5e-5
    per_device_train_batch_size: Count = 32
    num_train_epochs: Epochs = 3.0
    max_steps: Count | None = None
    seed: Seed = 42

    def steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps, at least one."""
        return self.max_steps or max(round(self.num_train_epochs * steps_per_epoch), 1)

    def warn_if_less_than_one_step(self, steps_per_epoch: int) -> None:
        """Log a warning if the epochs are less than one step."""
        if self.max_steps is None and not round(self.num_train_epochs * steps_per_epoch):
            logger.warning(
                "%g epochs are less than one step, of which an epoch has %d: the run takes one",
                self.num_train_epochs,
                steps_per_epoch,
            )


@dataclass(frozen=True, kw_only=True)
class FinetuneBase(TaskSettings):
    """Settings of a fine-tuning run without its hyperparameters, which `bertfast finetune` and `bertfast sweep` share.

    Attributes:
        train_file: Training data: .tsv (with header, no quoting), .csv, .jsonl, .json, or .conll with one word
            and its label per line; may be compressed.
        output_dir: Output folder for the best model, its model card (README.md), metrics.jsonl, all_results.json,
            run.json and predictions.
        validation_file: Validation data in the same format. If not given: the last model counts as the best.
        test_file: Data that the best model predicts on; labels are optional and only used for metrics. If not given: no
            predictions.
        model: Model that is fine-tuned.
        lora: Training of low-rank updates (LoRA) and the head, with peft, while the model's own weights are frozen.
        feature_based: Fine-tuning of the whole model, or training of a BiLSTM on its layers.
        batch: Division of the examples of a step.
        optimizer: Loss and optimizer.
        evaluation: Validation, choice of the best model, and metrics.
        samples: Parts of the data, for quick trials.
    """

    train_file: str
    output_dir: str
    validation_file: str | None = None
    test_file: str | None = None
    model: InitialModelSettings = field(default_factory=InitialModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    feature_based: FeatureBasedSettings = field(default_factory=FeatureBasedSettings)
    batch: BatchSettings = field(default_factory=BatchSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    samples: SampleSettings = field(default_factory=SampleSettings)
    compute: FloatingPointSettings = field(default_factory=FloatingPointSettings)

    def validate(self) -> None:
        super().validate()
        evaluation = self.evaluation
        names = {"--eval-steps", "--early-stopping-patience", "--metric-for-best-model"}.intersection(given(evaluation))
        if self.validation_file is None:
            refuse_without_effect(sorted(names), "there is no --validation-file")
            names = {"--max-eval-samples"}.intersection(given(self.samples))
            refuse_without_effect(names, "there is no --validation-file")
        if self.test_file is None:
            names = {"--max-predict-samples"}.intersection(given(self.samples))
            refuse_without_effect(names, "there is no --test-file")
        if self.lora.lora_rank is not None:
            others = ["--strategy feature-based"] * (self.feature_based.strategy == "feature-based")
            others += {"--random-init", "--bilstm"}.intersection(given(self.model))
            if others:
                raise ValueError(f"--lora-rank adapts a pre-trained model, and excludes {others[0]}: leave one out")
        if self.feature_based.strategy == "fine-tuning":
            refuse_without_effect(given(self.feature_based), "this belongs to --strategy feature-based")
            return
        names = {"--layerwise-lr-decay"}.intersection(given(self.optimizer))
        refuse_without_effect(names, "--strategy feature-based trains no layer of the encoder")
        if self.model.bilstm:
            refuse_without_effect(["--bilstm"], "--strategy feature-based has a BiLSTM of its own")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(FinetuneBase):
    """Settings of a fine-tuning run.

    Attributes:
        hyperparameters: Hyperparameters that the BERT paper varies between tasks.
        checkpoint: Checkpoints, and resuming from them.
        report: Libraries that receive the metrics.
        overwrite_output_dir: Replace the model and the results of another run in --output-dir.
    """

    hyperparameters: Hyperparameters = field(default_factory=Hyperparameters)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    report: MetricsWriterSettings = field(default_factory=MetricsWriterSettings)
    overwrite_output_dir: bool = False

    def validate(self) -> None:
        super().validate()
        if self.overwrite_output_dir and self.checkpoint.resume:
            raise ValueError("--overwrite-output-dir removes the run that --resume needs: leave one out")
