"""The model of a pre-training run, the memory that it needs, and its step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import BertConfig

from bertfast.models.families import pretraining_class
from bertfast.models.files import load
from bertfast.models.patch import require_packed
from bertfast.models.registry import FusedModel
from bertfast.runtime.cuda_graph import can_capture, cuda_graphs
from bertfast.runtime.precision import ChosenPrecision
from bertfast.training.checkpoint import align_parameters
from bertfast.training.distributed import Distributed
from bertfast.training.initial_model import encoder_layers, initial_model, train_in_part
from bertfast.training.memory_estimate import MemoryEstimate, estimate_memory
from bertfast.training.optimizer import build_optimizers
from bertfast.training.pretrain_settings import PretrainSettings
from bertfast.training.step import Objective, TrainStep


def build_model(
    settings: PretrainSettings,
    config: BertConfig,
    initial: Path | None,
    saved: Path | None,
    *,
    device: torch.device,
    precision: ChosenPrecision,
) -> FusedModel:
    """Return the model that a run trains, on its device.

    Args:
        settings: Settings of the run.
        config: Configuration of the model.
        initial: Folder of the initial model; None: random weights.
        saved: Checkpoint that the run continues from; None: it starts from the initial model.
        device: Device of this process.
        precision: fp32, bf16 or fp16.

    Raises:
        ValueError: The model cannot run on packed batches in this precision.
    """
    if saved is None:
        model = initial_model(config, initial)
    else:
        model, _, _ = load(pretraining_class(config), saved, config)
    align_parameters(model)
    nn.Module.to(model, device)  # transformers' own `to` has the type of a plain function
    require_packed(model.train(), precision)
    train_in_part(model, pairs=settings.sampling.pairs, checkpoint_layers=settings.compute.checkpoint_layers)
    return model


def memory_of_run(
    settings: PretrainSettings, model: FusedModel, precision: ChosenPrecision, processes: int
) -> MemoryEstimate:
    """Return the estimated memory of a process of a run.

    Args:
        settings: Settings of the run.
        model: Its model.
        precision: fp32, bf16 or fp16.
        processes: Number of its processes.
    """
    return estimate_memory(
        model,
        model.config,
        optimizer=settings.optimizer.optimizer,
        precision=precision,
        residual_precision=settings.compute.residual_precision,
        tokens=settings.batch.tokens_per_batch,
        checkpointed=settings.compute.checkpoint_layers,
        ranks=processes if settings.compute.shard else 1,
    )


def pretraining_step(
    settings: PretrainSettings, model: FusedModel, distributed: Distributed, precision: ChosenPrecision
) -> TrainStep:
    """Return the step of a run, with new optimizers.

    Args:
        settings: Settings of the run.
        model: Its model.
        distributed: Its processes.
        precision: fp32, bf16 or fp16.
    """
    options, compute = settings.optimizer, settings.compute
    objective = Objective(model, torch.bfloat16 if compute.residual_precision == "bf16" else None)
    # With several ranks the backward pass communicates, which is not captured.
    capturable = distributed.world_size == 1 and can_capture(model.config, precision, distributed.device)
    return TrainStep(
        distributed.wrap(objective, encoder_layers(model), compute.shard),
        build_optimizers(
            model,
            options.optimizer,
            options.learning_rate,
            options.weight_decay,
            (options.adam_beta1, options.adam_beta2),
        ),
        distributed,
        precision=precision,
        seed=torch.tensor(settings.seed, device=distributed.device),
        max_grad_norm=options.max_grad_norm,
        capture=cuda_graphs() if compute.cuda_graph and capturable else None,
    )
