"""Imports point downwards, or within a floor where it is said here, and never in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bertfast"
FLOORS = {
    "kernels": 0,
    "runtime": 0,
    "compiled": 0,
    "cuda_build": 0,
    "dropout": 0,
    "memory": 0,
    "pictures": 0,
    "precision": 0,
    "products": 0,
    "sequences": 0,
    "reference": 0,
    "ops": 1,
    "data": 1,
    "cuda_graphs": 2,
    "encoder": 2,
    "tensor_bundle": 0,
    "architectures": 3,
    "models": 3,
    "tasks": 4,
    "training": 4,
    "original": 4,
    "export": 4,
    "beside": 5,
    "verify": 5,
    "speedup": 5,
    "demo": 5,
    "self_test_problems": 2,
    "self_test": 3,
    "doctor": 5,
    "reproduce": 5,
    "cli": 5,
    "": 6,  # the package itself, which says what is public
}
WITHIN = {
    ("compiled", "kernels"),
    ("cuda_build", "compiled"),
    ("products", "kernels"),
    ("products", "runtime"),
    ("precision", "products"),
    ("reference", "dropout"),
    ("reference", "runtime"),
    ("reference", "sequences"),
    ("sequences", "kernels"),
    ("sequences", "runtime"),
    ("dropout", "runtime"),
    ("models", "architectures"),
    ("training", "tasks"),
    ("reproduce", "cli"),
    ("verify", "beside"),
    ("speedup", "beside"),
}


# What has to do with models, which are those of `transformers`; all else does without it.
FOR_TRANSFORMERS = ("models", "architectures", "tasks", "training", "export", "original", "beside")


def module_name(path: Path) -> str:
    """`bertfast.ops.embed` of bertfast/ops/embed.py, `bertfast.ops` of its __init__.py."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """The modules of the package that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return {name for name in found if name.split(".")[0] == "bertfast"}


def room(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    here = room(module)
    for target in imported(MODULES[module]):
        there = room(target)
        allowed = FLOORS[there] < FLOORS[here] or here == there or (here, there) in WITHIN
        assert allowed, f"{module} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})"


def test_imports_form_no_circle():
    TopologicalSorter({module: imported(path) for module, path in MODULES.items()}).prepare()


def test_the_shipped_package_imports_no_tests_and_transformers_only_where_that_is_the_point():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        forbidden = {"tests", "bench", "helpers"} | (set() if room(module) in FOR_TRANSFORMERS else {"transformers"})
        assert not {name.split(".")[0] for name in names} & forbidden, module


def test_kernels_import_torch_triton_and_one_another_only():
    for path in (PACKAGE.parent / "kernels").glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        for name in names:
            top = name.split(".")[0]
            allowed = top in {"torch", "triton", *sys.stdlib_module_names} or name.startswith("bertfast.kernels")
            assert allowed, f"{path.name} imports {name}"
