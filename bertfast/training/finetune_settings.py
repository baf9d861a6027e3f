"""Settings of `bertfast finetune`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bertfast.tasks.task import TaskSettings


@dataclass(kw_only=True)
class FinetuneSettings(TaskSettings):
    """Settings of a fine-tuning run.

    Attributes:
        train_file: Training data: .tsv (with header, no quoting), .csv, .jsonl, SQuAD's .json, or .conll with one word
            and its label per line; may be compressed.
        output_dir: Output folder for the best model, metrics.jsonl, all_results.json and predictions.
        validation_file: Validation data in the same format; none: the last model counts as the best.
        test_file: Data that the best model predicts on; labels are optional and only used for metrics.
        strategy: fine-tuning trains the whole model; feature-based freezes it and trains a BiLSTM on its layers (token
            classification only).
        feature_layers: Layers that feature-based uses: embeddings, second-to-last, last, mean-last-four,
            concat-last-four or mean-all; sums have learned weights.
        lstm_size: Hidden size of each direction of the feature-based BiLSTM.
        lstm_layers: Number of layers of the feature-based BiLSTM.
        features_dir: Folder that caches the layers for feature-based, reused for the same encoder and text; none: a
            temporary folder.
        bilstm: Put a BiLSTM of two layers, as wide as the model, between the encoder and the head.
        random_init: Use only configuration and tokenizer of the model, with random weights.
        init_from_task: Model fine-tuned on another task whose encoder to start from, such as MNLI for RTE; its head is
            not used.
        class_weights: balanced: weight each example inversely to the frequency of its label.
        per_device_train_batch_size: Examples per forward and backward pass.
        gradient_accumulation_steps: Passes per optimizer step.
        tokens_per_batch: Token limit of a pass; a longer one is divided, with the same result.
        num_train_epochs: Number of passes over the training data.
        learning_rate: Peak learning rate; decays linearly to 0.
        warmup_ratio: Fraction of the run in which the learning rate rises to its peak.
        weight_decay: Weight decay of matrices; biases and LayerNorm parameters do not decay.
        max_grad_norm: Gradient-clipping norm (0 = off).
        dropout: Dropout probability of hidden activations and attention weights; none: that of the model.
        eval_steps: Steps between validations; none: once per epoch.
        metric_for_best_model: Metric that selects the best model; none: the task's first.
        early_stopping_patience: Stop after this many validations in a row without improvement; none: never.
        logging_steps: Steps between entries of metrics.jsonl.
        seed: Random seed of new weights, the order of examples and dropout.
        overwrite_output_dir: Overwrite a model in output_dir.
    """

    train_file: str
    output_dir: str
    validation_file: str | None = None
    test_file: str | None = None
    strategy: Literal["fine-tuning", "feature-based"] = "fine-tuning"
    feature_layers: str = "concat-last-four"
    lstm_size: int = 768
    lstm_layers: int = 2
    features_dir: str | None = None
    bilstm: bool = False
    random_init: bool = False
    init_from_task: str | None = None
    class_weights: Literal["none", "balanced"] = "none"
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    tokens_per_batch: int = 16_384
    num_train_epochs: float = 3.0
    learning_rate: float = 5e-5
    warmup_ratio: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    dropout: float | None = None
    eval_steps: int | None = None
    metric_for_best_model: str | None = None
    early_stopping_patience: int | None = None
    logging_steps: int = 50
    seed: int = 42
    overwrite_output_dir: bool = False

    def __post_init__(self):
        super().__post_init__()
        counts = ("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_batch", "eval_steps")
        for name in (*counts, "early_stopping_patience", "logging_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{_flag(name)} must be at least 1, got {value}")
        if self.num_train_epochs <= 0:
            raise ValueError(f"--num-train-epochs must be more than 0, got {self.num_train_epochs}")
        if self.validation_file is None and (self.early_stopping_patience or self.metric_for_best_model):
            raise ValueError("--early-stopping-patience and --metric-for-best-model require --validation-file")
        if self.features_dir is not None and self.strategy != "feature-based":
            raise ValueError("--features-dir requires --strategy feature-based, in which the encoder does not change")
        if self.random_init and self.init_from_task is not None:
            raise ValueError(
                "--random-init and --init-from-task exclude each other: choose one source of the initial weights"
            )


def _flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")
