"""Finding nvcc and its supported architectures; errors if CUDA kernels are missing or unsupported."""

import sys
from pathlib import Path

import pytest
import torch
from fake_nvcc import write_nvcc
from torch._subclasses.fake_tensor import FakeTensorMode

from bertfast.ops import cuda_build, native
from bertfast.ops.cuda_build import CudaBuild, runs_on
from bertfast.ops.dispatch import resolve

sys.path.insert(0, str(Path(__file__).parents[2] / "build_support"))
import cuda_toolkit
from cuda_toolkit import ToolkitError, architectures, find_nvcc, gencode

VARIABLES = ("NVCC", "CUDA_HOME", "CUDA_PATH", "TORCH_CUDA_ARCH_LIST", "NVCC_CCBIN")
BUILD = CudaBuild(
    nvcc="13.0.88",
    reason=None,
    architectures={"attention": ["90a"], "attention_backward": ["90a"], "bias_gelu": ["80", "90", "120+PTX"]},
    missing={"cross_entropy": {"error": "nvcc 13.0.88 failed (error: planted): set NVCC", "output": "error: planted"}},
    slow={"attention": ["ptxas info : (C7510) wgmma.mma_async instructions are serialized"]},
)


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch, tmp_path):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def nvcc(tmp_path, monkeypatch, **options):
    monkeypatch.setenv("NVCC", str(write_nvcc(tmp_path, **options)))
    return find_nvcc()


def test_nvcc_says_its_version_and_architectures(tmp_path, monkeypatch):
    found = nvcc(tmp_path, monkeypatch, release="12.4", architectures="75 80 90")
    assert found.release == (12, 4)
    assert found.supported == {75, 80, 90}


def test_nvcc_of_cuda_home_comes_before_that_of_the_path(tmp_path, monkeypatch):
    home, path = write_nvcc(tmp_path / "home" / "bin"), write_nvcc(tmp_path / "path")
    monkeypatch.setenv("PATH", str(path.parent))
    assert find_nvcc().path == str(path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert find_nvcc().path == str(home)


def test_nvcc_of_pypi_is_found_in_site_packages(tmp_path, monkeypatch):
    program = write_nvcc(tmp_path / "nvidia" / "cu13" / "bin")
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert find_nvcc().path == str(program)


def test_without_nvcc_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "_candidates", lambda: iter([None]))
    with pytest.raises(ToolkitError, match=r"nvcc was not found: pip install 'cuda-toolkit\[.*NVCC=/path/to/nvcc"):
        find_nvcc()
    monkeypatch.setenv("NVCC", "")
    with pytest.raises(ToolkitError, match="NVCC is empty, which turns the CUDA kernels off: unset NVCC"):
        find_nvcc()
    monkeypatch.setenv("NVCC", "/nonexistent/nvcc")
    with pytest.raises(ToolkitError, match=r"/nonexistent/nvcc does not run \(.*No such file"):
        find_nvcc()


def test_an_nvcc_that_is_too_old_is_named(tmp_path, monkeypatch):
    with pytest.raises(ToolkitError, match=r"nvcc 11.8.88 \(.*\) is too old, 12.0 or later is required"):
        nvcc(tmp_path, monkeypatch, release="11.8")


@pytest.mark.parametrize(
    ("supported", "listed", "expected"),
    [
        ("75 80 90 100 120", None, ["80", "90", "100", "120+PTX"]),
        ("75 80 90", None, ["80", "90+PTX"]),  # nvcc 12.4
        ("80 86 90 120", "8.0 8.6+PTX;9.0a", ["80", "86+PTX", "90a"]),
        ("80 90 120", "Hopper", ["90+PTX"]),
        ("80 90 120", "7.5;8.0;10.0", ["80"]),  # no kernel runs on 7.5, and this nvcc does not know 10.0
    ],
)
def test_architectures_are_those_that_nvcc_supports(tmp_path, monkeypatch, supported, listed, expected):
    if listed is not None:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    assert architectures(nvcc(tmp_path, monkeypatch, architectures=supported)) == expected


@pytest.mark.parametrize(
    ("listed", "message"),
    [("sm_90", "has 'sm_90', which is no GPU architecture: write for example"), ("7.5", "set TORCH_CUDA_ARCH_LIST to")],
)
def test_a_list_without_a_usable_architecture_is_refused(tmp_path, monkeypatch, listed, message):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
    with pytest.raises(ToolkitError, match=message):
        architectures(nvcc(tmp_path, monkeypatch))


def test_ptx_is_embedded_on_request():
    assert gencode(["90a", "120+PTX"]) == (
        "-gencode=arch=compute_90a,code=sm_90a -gencode=arch=compute_120,code=[sm_120,compute_120]"
    )


def test_the_host_compiler_is_passed_without_its_cache(monkeypatch):
    assert cuda_toolkit.host_compiler_flag(["/usr/bin/ccache", "g++-13"]) == "-ccbin=g++-13"
    monkeypatch.setenv("NVCC_CCBIN", "g++-12")
    assert cuda_toolkit.host_compiler_flag(["g++-13"]) == ""


def test_only_warnings_about_speed_are_reported():
    spill = "ptxas warning : Registers are spilled to local memory in function 'f', 8 bytes spill stores"
    serialised = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    )
    waits = "ptxas info    : (C7517) warpgroup.wait is injected in around line 120 by compiler"
    harmless = "ptxas info    : (C7519) warpgroup.arrive is injected in around line 124 by compiler"
    assert cuda_toolkit.losses("\n".join([spill, serialised, waits, harmless])) == [spill, serialised, waits]


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("90a", (9, 0), True),
        ("90a", (10, 0), False),
        ("80", (8, 9), True),
        ("86", (8, 0), False),
        ("80", (9, 0), False),
        ("120+PTX", (13, 0), True),
        ("120+PTX", (10, 0), False),
    ],
)
def test_a_gpu_runs_its_major_version_and_older_ptx(target, capability, runs):
    assert runs_on(target, capability) == runs


@pytest.fixture
def on_gpu(monkeypatch):
    """A tensor for a GPU with the library of BUILD, without the kernels that it lacks."""
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", None)
    monkeypatch.setattr(cuda_build, "BUILD", BUILD)
    monkeypatch.setattr(cuda_build, "_FOUND", (BUILD, Path("_C.cuda.json")))
    monkeypatch.setattr(cuda_build, "driver_cuda_version", lambda: (13, 0))
    monkeypatch.setattr(native, "has_kernel", lambda kernel, device: device.type == "cuda" and "cross" not in kernel)
    with FakeTensorMode():
        yield torch.empty(4, 3, dtype=torch.bfloat16, device="cuda")


def reason(operation, x) -> str:
    with pytest.raises(ValueError, match="implementation 'cuda' is not available") as refused:
        resolve(operation, "cuda", x)
    return str(refused.value)


def test_the_error_says_why_a_source_was_not_built(on_gpu):
    assert "cross_entropy.cu was not built: nvcc 13.0.88 failed (error: planted): set NVCC" in reason(
        "linear_cross_entropy", on_gpu
    )


def test_the_error_says_why_no_kernel_was_built(on_gpu, monkeypatch):
    nothing = CudaBuild(nvcc=None, reason="nvcc was not found: install it", architectures={}, missing={}, slow={})
    monkeypatch.setattr(cuda_build, "BUILD", nothing)
    monkeypatch.setattr(native, "has_kernel", lambda kernel, device: False)
    assert "the CUDA kernels were not built: nvcc was not found: install it" in reason("attention", on_gpu)
    assert cuda_build.summary() == "not built: nvcc was not found: install it"


def test_the_error_names_a_gpu_without_compiled_kernels(on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert "its kernels are compiled for sm_90a, this GPU is sm_100" in reason("attention", on_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert resolve("attention", "cuda", on_gpu) == "cuda"


def test_a_driver_of_an_older_major_version_is_named(on_gpu, monkeypatch):
    monkeypatch.setattr(cuda_build, "driver_cuda_version", lambda: (12, 8))
    text = reason("attention", on_gpu)
    assert "its kernels were built with nvcc 13.0.88, and the driver is for CUDA 12.8" in text
    assert "update the driver to one for CUDA 13, or install bertfast again with nvcc 12" in text
    assert "the driver is for CUDA 12.8" in cuda_build.summary()


@pytest.mark.usefixtures("on_gpu")
def test_the_summary_names_what_is_missing_slow_or_of_another_version(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    text = cuda_build.summary()
    assert text.startswith("built with nvcc 13.0.88 for sm_80, sm_90, sm_90a, sm_120 with PTX for later GPUs; ")
    assert "cross_entropy.cu was not built: nvcc 13.0.88 failed (error: planted)" in text
    assert "attention.cu is slower than it should be: ptxas info : (C7510)" in text
    assert "PyTorch has CUDA 12.8, another major version than nvcc's" in text


def test_tensors_on_a_cpu_are_refused(on_gpu):
    assert "the tensors are on cpu, not on a GPU" in reason("bias_gelu", torch.empty(4, 3, device="cpu"))
