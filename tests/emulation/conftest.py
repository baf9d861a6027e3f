"""Builds the kernels of this folder into modules for Python: as the emulation runs them, and the probes for a GPU of
sm_90 where there is one."""

import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest
import torch

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = "-x c++ -std=c++20 -O1 -shared -fPIC -fvisibility=hidden -Wno-unknown-pragmas -Wno-psabi"
NVCC_FLAGS = "-std=c++20 -O3 -arch=sm_90a --expt-relaxed-constexpr -shared -Xcompiler=-fPIC,-fvisibility=hidden"


def emulated(name: str, folder: Path):
    """The module of `name`.cu on a CPU."""
    if COMPILER is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulation wants g++ on x86-64")
    return build(name, folder, [COMPILER, *FLAGS.split()])


def build(name: str, folder: Path, command: list[str]):
    """The module of `name`.cu."""
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [pybind11.get_include(), sysconfig.get_path("include"), str(HERE), str(HERE.parents[1] / "csrc" / "cuda")]
    includes = [f"-I{path}" for path in folders]
    subprocess.run([*command, *includes, str(HERE / f"{name}.cu"), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def probes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("probes")
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return emulated("probes", folder)
    if shutil.which("nvcc") is None:
        pytest.skip("the probes want nvcc beside the GPU")
    return build("probes", folder, ["nvcc", *NVCC_FLAGS.split()])


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    return emulated("mistakes", tmp_path_factory.mktemp("mistakes"))


@pytest.fixture(params=[0, 1, 2, 3])
def seed(request, monkeypatch):
    """0 runs threads in order, others shuffle them."""
    monkeypatch.setenv("BERTFAST_EMULATION_SEED", str(request.param))
