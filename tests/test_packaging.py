"""A wheel and an sdist hold what they should, and the wheel works from anywhere."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


LIBRARY = "bertfast/_C.abi3.so"
MODULES = {str(path.relative_to(ROOT)) for path in (ROOT / "bertfast").rglob("*.py")}
MODULES |= {f"bertfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}


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
    """A folder with an sdist and a wheel made from it."""
    run("-m", "build", "--no-isolation", "--outdir", tree.parent, tree, cwd=tree, CXXFLAGS="-O0")
    return tree.parent


def contents(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_every_module_and_the_library_and_nothing_else(built):
    (wheel,) = built.glob("*.whl")
    assert "-cp311-abi3-linux_" in wheel.name
    library = {LIBRARY} if shutil.which("g++") else set()
    assert contents(wheel) == MODULES | {"bertfast/py.typed"} | library


def test_without_a_compiler_there_is_no_library_and_the_plain_path(tree, tmp_path):
    environment = {"CXX": "/nonexistent", "PATH": os.defpath}
    ran = run("setup.py", "build_ext", "--inplace", cwd=tree, **environment)
    assert "WARNING: bertfast's compiled library was not built" in ran.stderr
    assert "No such file or directory: '/nonexistent'" in ran.stderr
    assert not (tree / LIBRARY).exists()
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree, cwd=tree, **environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert contents(wheel) == MODULES | {"bertfast/py.typed"}
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = "from bertfast import compiled, ops; import torch; x = torch.ones(2, 3); ops.bias_gelu(x, x[0]); "
    ran = run("-c", code + "print(compiled.ABSENT)", cwd=tmp_path, PYTHONPATH=str(tmp_path / "site"))
    assert ran.stdout == "the compiled library was not built: install bertfast again with a C++20 compiler\n"


def test_the_sdist_holds_what_it_takes_to_build_and_test(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "setup.py", "Makefile", "LICENSE", "README.md", "kernels/__init__.py"} <= names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")} <= names
    assert {"bertfast/reference.py", "tests/helpers.py", "bench/harness.py"} <= names


def test_the_installed_wheel_imports_from_anywhere(built, tmp_path):
    (wheel,) = built.glob("*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = "import bertfast.models as m, bertfast.kernels as k; print(m.BertModel, m.__file__, k.__file__)"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(site)}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count(str(site)) == 2
