"""Why models of other families are left to transformers."""

from __future__ import annotations

from torch import nn

from bertfast.architectures import version_unsupported_reason

_REASONS = {
    "albert": "its layers share their parameters",
    "convbert": "its layers contain convolutions",
    "deberta": "its attention scores depend on relative positions",
    "deberta-v2": "its attention scores depend on relative positions",
    "funnel": "its layers shorten the sequences",
    "longformer": "its attention is a window with global tokens",
    "mobilebert": "its layers contain bottlenecks",
    "mpnet": "its attention scores depend on relative positions",
    "roberta-prelayernorm": "its layers normalise their input",
    "xlm-roberta-xl": "its layers normalise their input",
}


def family_unsupported_reason(model: nn.Module) -> str | None:
    """Return why there is no fused class for a model's family; None for a module that is no model of a family."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or not model_type:
        return None
    known = version_unsupported_reason(model_type) or _REASONS.get(model_type)
    return known or f"bertfast has no adapter for models of type {model_type}"
