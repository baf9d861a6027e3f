"""Packages import those of lower levels, and modules never in a circle."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "bertfast"
LEVELS = (  # a package imports those of its own level and of those before
    ("kernels",),
    ("data", "ops", "runtime"),
    ("encoder",),
    ("architectures",),
    ("models",),
    ("tasks",),
    ("convert", "inference", "training"),
    ("cli",),
    ("__main__", ""),  # the package itself, which says what is public
)
LEVEL = {package: number for number, packages in enumerate(LEVELS) for package in packages}

# Packages that import `transformers`, whose models they use; the others must not.
FOR_TRANSFORMERS = ("architectures", "models", "tasks", "convert", "inference", "training", "cli")


def module_name(path: Path) -> str:
    """`bertfast.ops.embeddings` of bertfast/ops/embeddings.py, `bertfast.ops` of its __init__.py."""
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


def package(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module):
    for target in imported(MODULES[module]):
        message = f"{module} imports {target}, of a higher level: {LEVELS}"
        assert LEVEL[package(target)] <= LEVEL[package(module)], message


def test_imports_form_no_circle():
    TopologicalSorter({module: imported(path) for module, path in MODULES.items()}).prepare()


def test_the_shipped_package_imports_no_tests_and_transformers_only_where_that_is_the_point():
    for module, path in MODULES.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        forbidden = {"tests", "bench", "helpers"} | (set() if package(module) in FOR_TRANSFORMERS else {"transformers"})
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
