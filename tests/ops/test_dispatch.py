"""Dispatch: which implementation runs, and errors for unsupported ones."""

import pytest
import torch
from helpers import normal
from torch._subclasses.fake_tensor import FakeTensorMode

from bertfast import ops
from bertfast.ops import dispatch, native
from bertfast.ops.dispatch import resolve

X = normal(4, 3).detach()


@pytest.fixture(autouse=True)
def _library_is_available(monkeypatch):
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", None)


def test_default_on_a_cpu_is_the_compiled_library_if_it_supports_the_tensors():
    assert resolve("x", None, X.float()) == "cpu"
    assert resolve("x", None, X.bfloat16()) == "cpu"
    assert resolve("x", None, X) == resolve("x", None, X.half()) == "reference"
    assert resolve("x", None, X.float(), "the head dimension is 20") == "reference"


def test_without_the_library_a_cpu_runs_the_reference(monkeypatch):
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", "the native library was not built")
    assert resolve("x", None, X.float()) == "reference"
    with pytest.raises(ValueError, match="implementation 'cpu' is not available: the native library was not"):
        resolve("x", "cpu", X.float())


@pytest.mark.parametrize(("capability", "chosen"), [((7, 5), "reference"), ((8, 0), "triton"), ((12, 0), "triton")])
def test_default_on_a_gpu_is_triton_if_it_supports_the_tensors(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        on_gpu = torch.empty(4, 3, device="cuda")
        assert resolve("x", None, on_gpu) == chosen
        assert resolve("x", None, on_gpu, "the head dimension is 20") == "reference"
        assert resolve("x", None, on_gpu.double()) == "reference"
        assert resolve("x", "reference", on_gpu) == "reference"


def test_rows_without_elements_run_the_reference_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with FakeTensorMode():
        assert resolve("x", None, torch.empty(4, 0, device="cuda")) == "reference"
        assert resolve("x", None, torch.empty(0, 4, device="cuda")) == "triton"
        with pytest.raises(ValueError, match="implementation 'triton' is not available: its kernels take rows of at l"):
            resolve("x", "triton", torch.empty(4, 0, device="cuda"))
    assert resolve("x", None, torch.empty(4, 0)) == "cpu"


def test_an_unsupported_implementation_is_refused_with_the_reason(monkeypatch):
    with pytest.raises(ValueError, match="implementation must be one of reference, cpu, triton, cuda, got 'fast'"):
        ops.bias_gelu(X, X[0], implementation="fast")
    with pytest.raises(ValueError, match="x: implementation 'triton' is not available: its kernels support float32"):
        resolve("x", "triton", X)
    with pytest.raises(ValueError, match="implementation 'cpu' is not available: its kernels support float32 and"):
        resolve("x", "cpu", X)
    with FakeTensorMode(), pytest.raises(ValueError, match="the tensors are on cuda:0, not on a CPU"):
        resolve("x", "cpu", torch.empty(4, 3, device="cuda"))
    monkeypatch.setattr(dispatch, "_INTERPRETED", False)
    with pytest.raises(ValueError, match="implementation 'triton' is not available: the tensors are on cpu, not on"):
        resolve("x", "triton", X.float())
    monkeypatch.setattr(dispatch, "_INTERPRETED", True)
    with pytest.raises(ValueError, match="implementation 'triton' is not available: the head dimension is 20"):
        resolve("x", "triton", X.float(), "the head dimension is 20")
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    with pytest.raises(ValueError, match="implementation 'triton' is not available: Triton is not installed"):
        resolve("x", "triton", X.float())
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with (
        FakeTensorMode(),
        pytest.raises(
            ValueError,
            match=r"its kernels require a GPU of sm_80 or later, this one is sm_75; pass implementation='r",
        ),
    ):
        resolve("x", "triton", torch.empty(4, 3, device="cuda"))


def test_parameters_in_half_precision_run_the_reference_on_a_cpu():
    """The library would read float16 as bfloat16."""
    x, vector = X.float(), X[0].half()
    for operator in (
        lambda name: ops.bias_gelu(x, vector, implementation=name),
        lambda name: ops.gelu_layer_norm(x, None, vector, None, 1e-12, implementation=name),
        lambda name: ops.add_layer_norm(x, x, vector, vector.float(), None, 1e-12, implementation=name),
        lambda name: ops.gated_activation(x[:, :2], "silu", vector[:2], implementation=name),
    ):
        assert torch.equal(operator(None), operator("reference"))
        with pytest.raises(ValueError, match=r"its kernels support float32 and bfloat16, got torch\.float16"):
            operator("cpu")


def test_reference_can_be_forced_everywhere():
    index = torch.arange(4) % 3
    results = [
        ops.bias_gelu(X, X[0], implementation="reference"),
        ops.linear_gelu(X, X, X[:, 0], implementation="reference"),
        ops.gelu_layer_norm(X, X[0], X[1], X[2], 1e-12, implementation="reference"),
        ops.gated_activation(X[:, :2], "gelu", implementation="reference"),
        *ops.pre_norm(X, X, None, X[1], X[2], 1e-12, implementation="reference"),
        ops.add_layer_norm(X, X, None, X[1], X[2], 1e-12, implementation="reference"),
        ops.embeddings(index, index, index, X, X, X, X[1], X[2], 1e-12, implementation="reference"),
        ops.rotary(torch.stack([X, X, X], 1)[..., None, :2], X[:, :2].float(), implementation="reference"),
        ops.linear_cross_entropy(X, index, X, X[:, 0], index, implementation="reference")[0],
    ]
    assert all(result.isfinite().all() for result in results)
