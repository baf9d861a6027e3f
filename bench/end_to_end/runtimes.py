"""Ways to run inference with a BERT on this machine, each built from the same weights.

`RUNTIMES` has a precision and a factory per runtime. A factory gets the `Weights` and returns a function from the
padded inputs of a batch to its hidden states; it raises if the runtime is not installed or cannot run here. All
runtimes accept batches of all shapes and use as many threads as PyTorch.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from torch import Tensor

import bertfast
from bench.harness import DEVICE, hf_config
from bertfast.runtime.precision import has_bf16_gemm

Precision = Literal["fp32", "bf16", "int8"]
Inputs = dict[str, Tensor]
Predict = Callable[[Inputs], Tensor]
CALIBRATION_BATCHES = 8  # of inputs, for the ranges of activations in int8


# Packages of the runtimes and of sentence-transformers' backends, as `import` names them, which the Makefile installs.
PACKAGES = ("onnxruntime", "openvino", "nncf", "optimum", "sentence_transformers")
HOW_TO_INSTALL = "start it with `make bench` or `make bench-inference`, which install them"


def missing_runtimes(packages: Sequence[str] = PACKAGES) -> list[str]:
    """Return the packages to compare with that are not installed."""
    return [name for name in packages if find_spec(name) is None]


@dataclass(frozen=True)
class Weights:
    """Weights of an encoder, and what runtimes make from them.

    Attributes:
        config: Sizes of the model.
        batches: Inputs, whose tokens runtimes see when they compile or calibrate.
        folder: Folder for exported models.
        trained: Folder of a model with these sizes; None: random weights.
    """

    config: bertfast.BertConfig
    batches: list[Inputs]
    folder: Path
    trained: Path | None = None

    @cached_property
    def reference(self) -> transformers.BertModel:
        """transformers' model, with PyTorch's scaled-dot-product attention, in fp32."""
        config, kind = hf_config(self.config), transformers.BertModel
        model: transformers.BertModel
        if self.trained is None:
            model = kind(config, add_pooling_layer=False)
        else:
            model = kind.from_pretrained(self.trained, config=config, add_pooling_layer=False)
        model.eval()
        return model

    def in_transformers(self, attention: str = "sdpa") -> transformers.BertModel:
        """Return transformers' model with an implementation of attention and the same tensors as weights."""
        return self._shared(transformers.BertModel(hf_config(self.config, attention), add_pooling_layer=False))

    def in_bertfast(self) -> transformers.BertModel:
        """Return bertfast's model with the same tensors as weights."""
        return self._shared(bertfast.BertModel(self.config, add_pooling_layer=False))

    def _shared(self, model: transformers.BertModel) -> transformers.BertModel:
        model.load_state_dict(self.reference.state_dict(), assign=True)
        model.eval()
        return model

    @cached_property
    def onnx(self) -> Path:
        """An ONNX file of the model for batches of all shapes, made unless `folder` has it already."""

        class HiddenStates(torch.nn.Module):
            def __init__(self, model: torch.nn.Module) -> None:
                super().__init__()
                self.model = model

            def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
                hidden: Tensor = self.model(input_ids, attention_mask, token_type_ids, return_dict=False)[0]
                return hidden

        path = self.folder / "model.onnx"
        if path.exists():
            return path
        example = {name: x.repeat(2, 1)[:2] for name, x in self.batches[0].items()}
        shape = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                HiddenStates(self.in_transformers()).eval(),
                tuple(example.values()),
                path,
                input_names=list(example),
                output_names=["hidden"],
                dynamic_shapes=tuple(shape for _ in example),
                verbose=False,
            )
        return path


class Runtime(NamedTuple):
    """A way to run the model: its precision and its factory."""

    precision: Precision
    build: Callable[[Weights], Predict]


def precision_of(name: str) -> Precision:
    """Return the precision of a system, in which its name ends: none stands for fp32."""
    if name.endswith(", bf16"):
        return "bf16"
    return "int8" if name.endswith(", int8") else "fp32"


def padded(sequences: Sequence[list[int]]) -> Inputs:
    """Return the inputs of a model, int64 [sequences, tokens of the longest]."""
    token_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    lengths = torch.tensor([[len(ids)] for ids in sequences])
    mask = (torch.arange(token_ids.shape[1]) < lengths).long()
    return {"input_ids": token_ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(token_ids)}


def require_bf16() -> None:
    """Raise NotImplementedError if this processor has no instructions for bf16."""
    if not has_bf16_gemm(DEVICE):
        raise NotImplementedError("this processor has no bf16 instructions")


def in_pytorch(model: torch.nn.Module) -> Predict:
    return lambda inputs: model(**inputs)[0]


def in_precision(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Return the model, or a copy in bf16, because others share the weights in fp32."""
    if dtype == torch.float32:
        return model
    require_bf16()
    return copy.deepcopy(model).to(dtype)


def with_bertfast(weights: Weights, dtype: torch.dtype = torch.float32) -> Predict:
    model = in_precision(weights.in_bertfast(), dtype)
    bertfast.freeze(model)
    return in_pytorch(model)


def bertfast_int8(weights: Weights) -> Predict:
    model = copy.deepcopy(weights.in_bertfast())
    bertfast.quantize(model, weights.batches[:CALIBRATION_BATCHES])
    return in_pytorch(model)


def with_transformers(weights: Weights, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Predict:
    return in_pytorch(in_precision(weights.in_transformers(attention), dtype))


def compiled(weights: Weights, dtype: torch.dtype = torch.float32) -> Predict:
    model = in_precision(weights.in_transformers(), dtype)
    model.compile(dynamic=True)
    return in_pytorch(model)


def torch_int8(weights: Weights) -> Predict:
    from torch.ao.quantization import quantize_dynamic

    model = copy.deepcopy(weights.in_transformers())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return in_pytorch(quantize_dynamic(model, {torch.nn.Linear}, torch.qint8))


def onnxruntime_fp32(weights: Weights) -> Predict:
    return _onnxruntime_session(weights.onnx)


def onnxruntime_int8(weights: Weights) -> Predict:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = weights.folder / "model-int8.onnx"
    logging.disable(logging.WARNING)  # it advises to pre-process models, which the export has done
    try:
        quantize_dynamic(weights.onnx, path, weight_type=QuantType.QInt8, per_channel=True)
    finally:
        logging.disable(logging.NOTSET)
    return _onnxruntime_session(path)


def _onnxruntime_session(path: Path) -> Predict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads go on spinning and slow down the implementation that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    names = {entry.name for entry in session.get_inputs()}

    def predict(inputs: Inputs) -> Tensor:
        feeds = {name: x.numpy() for name, x in inputs.items() if name in names}
        return torch.from_numpy(session.run(None, feeds)[0])

    return predict


def with_openvino(weights: Weights, precision: Precision) -> Predict:
    import openvino

    core = openvino.Core()
    model = core.read_model(str(weights.onnx))
    if precision == "int8":
        model = _quantized(model, weights.batches)
    elif precision == "bf16":
        require_bf16()
    settings: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled_model = core.compile_model(model, "CPU", settings)
    names = {name for entry in compiled_model.inputs for name in entry.names}

    def predict(inputs: Inputs) -> Tensor:
        feeds = {name: x.numpy() for name, x in inputs.items() if name in names}
        return torch.from_numpy(compiled_model(feeds)[0])

    return predict


def _quantized(model: Any, batches: list[Inputs]) -> Any:
    """Return OpenVINO's model with weights and activations in int8, by NNCF's settings for transformers."""
    import nncf

    samples = [{name: x.numpy() for name, x in batch.items()} for batch in batches[:CALIBRATION_BATCHES]]
    return nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)


RUNTIMES: dict[str, Runtime] = {
    "bertfast": Runtime("fp32", with_bertfast),
    "transformers": Runtime("fp32", with_transformers),
    "transformers, eager attention": Runtime("fp32", partial(with_transformers, attention="eager")),
    "transformers, compiled": Runtime("fp32", compiled),
    "ONNX Runtime": Runtime("fp32", onnxruntime_fp32),
    "OpenVINO": Runtime("fp32", partial(with_openvino, precision="fp32")),
    "bertfast, bf16": Runtime("bf16", partial(with_bertfast, dtype=torch.bfloat16)),
    "transformers, bf16": Runtime("bf16", partial(with_transformers, dtype=torch.bfloat16)),
    "transformers, compiled, bf16": Runtime("bf16", partial(compiled, dtype=torch.bfloat16)),
    "OpenVINO, bf16": Runtime("bf16", partial(with_openvino, precision="bf16")),
    "bertfast, int8": Runtime("int8", bertfast_int8),
    "PyTorch, int8": Runtime("int8", torch_int8),
    "ONNX Runtime, int8": Runtime("int8", onnxruntime_int8),
    "OpenVINO, int8": Runtime("int8", partial(with_openvino, precision="int8")),
}
