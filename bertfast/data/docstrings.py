"""The default corpus: the docstrings of Python and of the installed packages."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import multiprocessing
import os
import sysconfig
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

from bertfast.data.prose import prose_paragraphs
from bertfast.runtime.atomic_write import atomic_path

STANDARD_LIBRARY = "python"  # the package name of its modules
# Folders with tests, or with copies of other packages.
SKIPPED = frozenset(
    {"test", "tests", "testing", "idlelib", "lib2to3", "site-packages", "_vendor", "_vendored", "vendor"}
)

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def gather_docstrings(path: Path, processes: int | None = None) -> Path:
    """Write the default corpus to `path` unless the file exists.

    Args:
        path: A `.jsonl` file. Each line is one module, with "package" ("torch"), "module" ("torch.nn.functional") and
            "text", whose lines are paragraphs.
        processes: Number of processes; None: one per CPU core.

    Returns:
        `path`.
    """
    if not path.exists():
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for package, module, paragraphs in docstring_documents(processes):
                record = {"package": package, "module": module, "text": "\n".join(paragraphs)}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
    return path


def docstring_documents(processes: int | None = None) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (package, module, paragraphs of prose) for every installed module with prose, showing a progress bar.

    The order depends on names alone, and only the first copy of a repeated paragraph is kept. No module is imported.
    """
    modules = sorted(set(_modules()))
    context = multiprocessing.get_context("spawn")
    seen = set()
    with ProcessPoolExecutor(processes or os.cpu_count(), context) as pool:
        found = pool.map(module_paragraphs, [path for _, _, path in modules], chunksize=16)
        bar = tqdm(zip(modules, found, strict=True), "docstrings", len(modules), unit="module")
        for (package, module, _), paragraphs in bar:
            new = [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph not in seen]
            seen.update(new)
            if new:
                yield package, module, new


def module_paragraphs(path: Path) -> list[str]:
    """Return the paragraphs of prose in the docstrings of a source file, in order."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source)
    except (SyntaxError, ValueError):  # a template, or a file for another Python version
        return []
    docstrings = (ast.get_docstring(node, clean=False) for node in _documented(tree))
    return [paragraph for docstring in docstrings if docstring for paragraph in prose_paragraphs(docstring)]


def _documented(node: ast.AST) -> Iterator[Documented]:
    """Yield the modules, classes and functions below a node in order; `ast.walk` would also visit all expressions."""
    if isinstance(node, Documented):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            yield from _documented(statement)


def _modules() -> Iterator[tuple[str, str, Path]]:
    """Yield (package, module, path) for the source files of the standard library and of all installed distributions."""
    library = Path(sysconfig.get_path("stdlib"))
    files = [(library, path.relative_to(library)) for path in library.rglob("*.py")]
    for distribution in importlib.metadata.distributions():
        root = Path(str(distribution.locate_file("")))
        files += [(root, Path(file)) for file in distribution.files or [] if file.suffix == ".py"]
    for root, file in files:
        if not SKIPPED.intersection(file.parts) and ".." not in file.parts and (root / file).is_file():
            module = ".".join(file.with_suffix("").parts).removesuffix(".__init__")
            yield STANDARD_LIBRARY if root == library else module.split(".")[0], module, root / file
