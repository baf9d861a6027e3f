"""The README's tree is what is on disk."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tree_in_the_readme_names_every_module_and_nothing_else():
    tree = re.search(r"## The tree\n+```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    named, folder = set(), ""
    for line in tree.splitlines():
        entry = line.split()[0]
        if line.startswith("  "):
            named.add(folder + entry)
        elif entry.endswith("/"):
            folder = entry
            named.add(entry)
    for shipped in ("bertfast", "kernels"):
        modules = {str(path.relative_to(ROOT)) for path in (ROOT / shipped).rglob("*.py") if path.name != "__init__.py"}
        assert {name for name in named if name.startswith(f"{shipped}/") and name.endswith(".py")} == modules
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {name for name in named if name.startswith("csrc/") and name != "csrc/"} == sources
    for name in named:
        assert (ROOT / name).exists(), name
