"""Builds the kernels of this folder, as the emulation runs them, into modules for Python."""

import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pybind11
import pytest

HERE = Path(__file__).parent
COMPILER = shutil.which("g++")
FLAGS = "-x c++ -std=c++20 -O1 -shared -fPIC -fvisibility=hidden -Wno-unknown-pragmas -Wno-psabi"


def build(name: str, folder: Path):
    """The module of `name`.cu."""
    if COMPILER is None or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the emulation wants g++ on x86-64")
    target = folder / f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    folders = [pybind11.get_include(), sysconfig.get_path("include"), str(HERE), str(HERE.parents[1] / "csrc" / "cuda")]
    includes = [f"-I{path}" for path in folders]
    subprocess.run([COMPILER, *FLAGS.split(), *includes, str(HERE / f"{name}.cu"), "-o", str(target)], check=True)
    spec = importlib.util.spec_from_file_location(name, target)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def probes(tmp_path_factory):
    return build("probes", tmp_path_factory.mktemp("probes"))


@pytest.fixture(scope="session")
def mistakes(tmp_path_factory):
    return build("mistakes", tmp_path_factory.mktemp("mistakes"))


@pytest.fixture(params=[0, 1, 2, 3])
def seed(request, monkeypatch):
    """0 runs threads in order, others shuffle them."""
    monkeypatch.setenv("BERTFAST_EMULATION_SEED", str(request.param))
