"""The README's layout is what is on disk."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_layout_in_the_readme_names_every_package_and_nothing_else():
    layout = re.search(r"## Layout\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    named = {line.split()[0].rstrip("/") for line in layout.splitlines()}
    packages = {f"bertfast/{path.parent.name}" for path in (ROOT / "bertfast").glob("*/__init__.py")}
    assert named == {"kernels", "csrc", "bench"} | packages


def test_no_module_of_the_package_is_loose():
    assert {path.name for path in (ROOT / "bertfast").glob("*.py")} == {"__init__.py", "__main__.py"}
