"""Every script in examples/ runs offline on a tiny model, all in this process, which imports torch once."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if path.stem != "tiny_model")  # which others import
NEEDS = {
    "lora": ["peft"],
    "onnx_export": ["onnx", "onnxruntime", "onnxscript"],
    "sentence_embeddings": ["sentence_transformers"],
    "serve": ["starlette", "uvicorn"],
    "trainer": ["accelerate"],
}
SCRIPTS = [pytest.param(path, id=path.stem) for path in EXAMPLES]


@pytest.mark.parametrize("script", SCRIPTS)
def test_example_runs(script, tmp_path, monkeypatch, capsys):
    for package in NEEDS.get(script.stem, []):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)  # as for a script that Python starts
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed
    for promised in re.findall(r"# (\['.+\])$", script.read_text(encoding="utf-8"), re.MULTILINE):
        assert promised in printed


def test_there_are_twelve_examples():
    assert len(EXAMPLES) == 12
