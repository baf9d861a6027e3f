"""`bench.sass_model.published_rows` fits one overhead to two widths, and compares the others with it."""

import json
import sys

import pytest
from sass_listings import EXIT, listing

from bench.sass_model import published_rows
from bench.sass_model.control_words import Control
from bench.sass_model.published_rows import FITTED, PUBLISHED


def kernel(columns: int) -> dict:
    """Return a kernel whose four warps copy a row each, 512 bytes per instruction."""
    load = ("LDG.E.128 R4, desc[UR4][R2.64]", Control(1, result=0))
    store = ("STG.E.128 desc[UR4][R2.64], R4", Control(1, waits=(0,)))
    code = listing([*[load] * (columns // 256), *[store] * (columns // 256), EXIT])
    return {"columns": columns, "rows": 4, "warps": 4, "registers": 32, "shared_memory": 0, "listing": code}


COMPILED = {"commit": "0123456", "compiler": "a compiler", "kernels": [kernel(columns) for columns in PUBLISHED]}


def test_an_overhead_that_all_figures_have_is_found(monkeypatch):
    alone = {
        one.columns: published_rows._bytes(one.columns) / one.alone / 1e9 for one in published_rows.compare(COMPILED)
    }
    figures = {columns: published_rows._bytes(columns) / (alone[columns] + 5e-6) / 1e9 for columns in PUBLISHED}
    monkeypatch.setattr(published_rows, "PUBLISHED", figures)
    found = published_rows.compare(COMPILED)
    assert [one.overhead for one in found] == pytest.approx([5e-6] * 4)
    assert [one.error for one in found] == pytest.approx([0] * 4, abs=1e-6)


def test_a_copy_reaches_the_bandwidth():
    assert all(0.85 * 3000 < one.alone <= 3000 for one in published_rows.compare(COMPILED))


def test_the_page_marks_what_is_held_out(monkeypatch, tmp_path):
    files = [tmp_path / "kernels.json", tmp_path / "page.md"]
    files[0].write_text(json.dumps(COMPILED))
    monkeypatch.setattr(sys, "argv", ["published_rows", str(files[0]), "--output", str(files[1])])
    published_rows.main()
    lines = files[1].read_text().splitlines()
    assert [columns for columns in PUBLISHED if f"| {columns:,} |" in "".join(lines)] == list(PUBLISHED)
    assert sum("| yes |" in line for line in lines) == len(PUBLISHED) - len(FITTED)


def test_a_width_without_a_kernel_is_named():
    with pytest.raises(ValueError, match="the file has no kernel for 2048 columns"):
        published_rows.compare(COMPILED | {"kernels": [kernel(512), kernel(1024), kernel(4096)]})
