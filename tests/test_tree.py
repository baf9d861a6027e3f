"""The documented layout is what is on disk, and files and functions are short."""

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_documented_layout_names_every_package_and_nothing_else():
    layout = re.search(r"## Layout\n+```\n(.*?)```", (ROOT / "docs" / "ARCHITECTURE.md").read_text(), re.DOTALL)[1]
    assert len(layout.splitlines()) == 12
    named = {name.rstrip("/") for name in re.findall(r"[\w/]+/(?=[\s:])", layout)}
    folders = (path.parent for path in (ROOT / "bertfast").glob("*/__init__.py"))
    packages = {f"bertfast/{folder.name}" for folder in folders if not folder.is_symlink()}
    assert named == {"kernels", "csrc", "bench"} | packages


def test_no_module_of_the_package_is_loose():
    assert {path.name for path in (ROOT / "bertfast").glob("*.py")} == {"__init__.py", "__main__.py"}


def source_files() -> list[Path]:
    command = ["git", "ls-files", "*.py", "*.cpp", "*.h", "*.cu", "*.cuh"]
    return [ROOT / name for name in subprocess.check_output(command, cwd=ROOT, text=True).splitlines()]


def test_files_have_less_than_400_lines():
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in source_files()}
    assert not {name: count for name, count in lines.items() if count >= 400}


def test_functions_have_less_than_60_lines():
    too_long = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in source_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 >= 60
    ]
    assert not too_long
