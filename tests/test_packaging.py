"""A wheel and an sdist hold what they should, and the wheel works from anywhere."""

import email
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from fake_nvcc import write_nvcc

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


SMOKE_TEST = ROOT / "build_support" / "smoke_test.py"
LIBRARY = "bertfast/_C.abi3.so"
CUDA_RECORD = "bertfast/_C.cuda.json"
with_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "bertfast").rglob("*.py")}
MODULES |= {f"bertfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
RECIPES = {f"bertfast/{path.relative_to(ROOT)}" for path in (ROOT / "recipes").rglob("*.yaml")}
PURE = MODULES | RECIPES | {"bertfast/py.typed"}  # all but the native library


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the tree, so that nothing is left in it."""
    folder = tmp_path_factory.mktemp("copy") / "tree"
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if files.returncode:
        pytest.skip("this is no git checkout")
    for name in files.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def run(*command: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    ran = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    return ran


@pytest.fixture(scope="module")
def built(tree) -> Path:
    """A folder with an sdist and a wheel made from it, where one CUDA source does not compile, and nvcc's calls."""
    source = tree / "csrc" / "cuda" / "cross_entropy.cu"
    source.write_text(source.read_text() + "#error a planted mistake\n")
    environment = {"CXXFLAGS": "-O0", "NVCC": str(write_nvcc(tree.parent)), "TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX"}
    run("-m", "build", "--no-isolation", "--outdir", tree.parent, tree, cwd=tree, **environment)
    return tree.parent


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_recipe_and_the_library_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert "-cp311-abi3-linux_" in wheel.name
    library = {LIBRARY, CUDA_RECORD} if shutil.which("g++") else set()
    assert contents(wheel) == PURE | library


@with_compiler
def test_a_cuda_source_that_does_not_compile_costs_only_itself(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    record = json.loads((tmp_path / CUDA_RECORD).read_text())
    assert record["commit"] == ""  # an sdist is no checkout
    assert list(record["missing"]) == ["cross_entropy"]
    assert "#error a planted mistake" in record["missing"]["cross_entropy"]["output"]
    architectures = record["architectures"]
    assert set(architectures) == {"attention", "attention_backward", "add_layer_norm", "bias_gelu", "gelu_layer_norm"}
    assert architectures["attention"] == ["90a"]
    assert architectures["bias_gelu"] == ["80", "90+PTX"]
    code = (
        "import torch; from bertfast.ops import cuda_build; from bertfast.ops.native import has_kernel;"
        "gpu = torch.device('cuda');"
        "print(has_kernel('cuda_attention_backward', gpu), has_kernel('cuda_gelu_layer_norm_backward', gpu),"
        " has_kernel('cuda_cross_entropy', gpu)); print(cuda_build.unsupported_reason('linear_cross_entropy'))"
    )
    ran = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    which, why = ran.stdout.splitlines()
    assert which == "True True False"
    assert why.startswith("cross_entropy.cu was not built: nvcc 13.0.88 failed (")
    assert "#error a planted mistake): set NVCC=/path/to/nvcc to another one and install bertfast again" in why


@with_compiler
def test_nvcc_is_given_the_architectures_and_the_host_compiler(built):
    calls = (built / "calls").read_text().splitlines()
    compiled = {call.split("-c ")[1].split("/")[-1].split(".")[0]: call for call in calls if " -c " in call}
    assert "-gencode=arch=compute_90a,code=sm_90a -c" in compiled["attention"]
    two = "-gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90,code=[sm_90,compute_90] -c"
    assert two in compiled["bias_gelu"]
    assert all("-ccbin=" in call for call in calls)


NO_COMPILER = {
    "broken CXX": ({"CXX": "/nonexistent", "PATH": os.defpath}, "No such file or directory: '/nonexistent'"),
    "nothing on PATH": ({"CXX": "", "CC": "false", "PATH": "/nonexistent"}, "no C++ compiler was found"),
}


@pytest.mark.parametrize(("environment", "reason"), NO_COMPILER.values(), ids=NO_COMPILER)
def test_without_a_compiler_the_package_installs_and_says_what_is_missing(tree, tmp_path, environment, reason):
    ran = run("setup.py", "build_ext", "--inplace", cwd=tree, **environment)
    assert "WARNING: bertfast's native library was not built" in ran.stderr
    assert reason in ran.stderr
    assert not (tree / LIBRARY).exists()
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, cwd=tree, **environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert contents(wheel) == PURE
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from bertfast import ops; from bertfast.ops import native; "
    code += "import torch; x = torch.ones(2, 3); ops.bias_gelu(x, x[0]); "
    ran = run("-c", code + "print(native.UNAVAILABLE_REASON)", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert ran.stdout == "the native library was not built: install bertfast again with a C++20 compiler\n"
    ran = run(SMOKE_TEST, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert "native library: none: the native library was not built" in ran.stdout


def test_the_sdist_holds_what_it_takes_to_build_and_test(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "Makefile", "LICENSE", "README.md", "kernels/__init__.py"} <= names
    assert "build_support/cuda_toolkit.py" in names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= names
    assert {"bertfast/ops/reference.py", "tests/helpers.py", "bench/harness.py"} <= names


def test_the_installed_wheel_imports_from_anywhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = "import bertfast as m, bertfast.kernels as k; print(m.BertModel, m.__file__, k.__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(site)) == 2


@with_compiler
def test_the_installed_wheel_passes_the_smoke_test(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path)
    ran = run(SMOKE_TEST, "--native", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert LIBRARY in ran.stdout


def test_the_package_index_gets_links_and_classifiers(built):
    (wheel,) = built.glob("*.whl")
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = email.message_from_bytes(archive.read(name))
    links = {link.partition(",")[0] for link in metadata.get_all("Project-URL")}
    assert links == {"Repository", "Documentation", "Changelog", "Issues"}
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert metadata["Keywords"]


def test_the_installed_wheel_has_one_version_and_finds_recipes_by_name(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import importlib.metadata, bertfast, bertfast.cli.recipes as r; from bertfast.cli.flags import parse;"
        "from bertfast.training.pretraining import PretrainSettings as S;"
        "print(importlib.metadata.version('bertfast') == bertfast.__version__, r.recipes_folder());"
        "print([parse('pretrain', S, ['--config', n, '--output-dir', 'x']).output_dir for n in r.recipe_names()])"
    )
    ran = run("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    version, output_dirs = ran.stdout.splitlines()
    assert version == f"True {tmp_path / 'site' / 'bertfast' / 'recipes'}"
    assert output_dirs == str(["x"] * len(list((ROOT / "recipes").glob("*.yaml"))))
