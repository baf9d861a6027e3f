"""Freeze or quantise the model of a program that only runs it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from bertfast.encoder.packed_linear import is_frozen
from bertfast.inference.int8_speed import log_int8_speed
from bertfast.models.calls import caches_shapes
from bertfast.models.freeze import freeze, fused_encoders
from bertfast.models.patch import require_packed
from bertfast.models.quantised_config import is_quantised
from bertfast.models.quantize import FEW_TOKENS, Runs, quantise_model, random_tokens
from bertfast.ops import matmul, native
from bertfast.runtime.precision import InferencePrecision, autocast, choose_precision, half
from bertfast.runtime.settings import counted
from bertfast.tasks.features import Buckets, Features, ModelInputs

logger = logging.getLogger("bertfast")

CALIBRATION_EXAMPLES = 32
"""The number of examples, the first of a command, on which a model is calibrated for int8."""

_FEW_TOKENS = 256  # different ones in these examples, below which random tokens make int8 more accurate


def require_own_precision(model: PreTrainedModel, precision: InferencePrecision) -> None:
    """Check the requested precision of a model that may be quantised already.

    Raises:
        ValueError: It is quantised, and another precision than int8 was requested.
    """
    if is_quantised(model.config) and precision not in ("auto", "int8"):
        raise ValueError(
            f"{model.name_or_path} is quantised to int8: leave --precision {precision} out, or give the model from "
            "which it was made"
        )


def examples_to_begin(model: PreTrainedModel, precision: InferencePrecision) -> int:
    """Return how many lines of standard input a program reads before it runs a model; fewer if the input ends.

    These are the ones on which it is calibrated for int8, which must not depend on how fast they arrive.
    """
    if precision != "int8" or is_quantised(model.config):
        return 1
    logger.info("int8 is calibrated on the first %d lines, so results begin when they are there", CALIBRATION_EXAMPLES)
    return CALIBRATION_EXAMPLES


def uncaptured_buckets(model: PreTrainedModel, precision: str, *, logits_per_token: bool = False) -> Buckets:
    """Return which sizes of a program's batches are padded, where no CUDA graphs are captured.

    These are the sizes for each of which oneDNN would keep code: see `matmul.caches_shapes`. Packed weights need none;
    the heads of a frozen model, in half precision, still do.

    Args:
        model: The model.
        precision: Its precision.
        logits_per_token: Whether its head reads each token, not each example.
    """
    with autocast(model.device, precision):
        by_encoder = any(map(caches_shapes, fused_encoders(model)))
    dtype = half(precision)
    by_head = dtype != torch.float32 and matmul.caches_shapes(model.device, dtype)
    return Buckets(tokens=by_encoder or (by_head and logits_per_token), examples=by_encoder or by_head)


@torch.no_grad()
def freeze_on_cpu(
    model: PreTrainedModel, requested: InferencePrecision, features: Features, run: Callable[[ModelInputs], object]
) -> None:
    """Pack the weights of a model for the rest of a program, where that is possible and has not been done.

    If int8 is slower than fp32 here, a warning says so.

    Args:
        model: The model, in evaluation mode.
        requested: Its precision. In int8 it is calibrated on the first examples, and also on random tokens if these
            have few, such as blank lines.
        features: The first examples of the program.
        run: Runs the model on a batch.
    """
    if model.device.type != "cpu" or native.UNAVAILABLE_REASON is not None:
        return
    if is_frozen(model):
        log_int8_speed(model, int(features.lengths.sum()))
        return
    precision = choose_precision(model.device, requested, model.config)
    if precision == "int8":
        rows = np.arange(min(CALIBRATION_EXAMPLES, len(features)))
        inputs = features.model_inputs(rows, labels=False)
        first = f"the first {counted(len(rows), 'input')}"
        runs: Runs = {first: lambda: run(inputs)}
        count = len(inputs.arguments["input_ids"].unique())
        if count < _FEW_TOKENS:
            runs = {**runs, **random_tokens(model)}
        if count < FEW_TOKENS:
            logger.warning(
                "there are only %s in %s, so that int8 is calibrated on random tokens, too: begin with typical texts, "
                "or give the folder of a model that bertfast.quantize has calibrated on them",
                counted(count, "different token"),
                first,
            )
        report = quantise_model(model, runs)
        logger.info("%s runs in int8, calibrated on %s", model.name_or_path, " and ".join(runs))
        for name, why in report.left.items():
            logger.warning("%s: %s", name, why)
        log_int8_speed(model, int(features.lengths.sum()))
    elif precision in ("fp32", "bf16"):
        freeze(model, precision)
    else:
        return
    require_packed(model, precision)
