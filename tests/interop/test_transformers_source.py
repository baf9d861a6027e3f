"""The BERT tests of a source tree of `transformers`, TRANSFORMERS_SOURCE, with every model patched when it is made."""

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTS = Path("tests", "models", "bert", "test_modeling_bert.py")
# Tests that pass unpatched and may fail patched, and why.
EXCEPTIONS: dict[str, str] = {}


def passed(source: Path, folder: Path, *options: str) -> set[str]:
    """The names of the tests that pass in a source tree."""
    report = folder / f"report{len(options)}.xml"
    paths = [str(source), str(HERE), str(HERE.parents[1])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(TESTS),
        f"--junitxml={report}",
        *options,
    ]
    subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    cases = ElementTree.parse(report).iter("testcase")
    return {case.get("name") for case in cases if not any(child.tag != "properties" for child in case)}


def broken_by_patching(source: Path, folder: Path) -> set[str]:
    """The tests that pass unpatched and fail patched."""
    plain = passed(source, folder)
    assert plain, f"no test of {source / TESTS} passes"
    return plain - passed(source, folder, "-p", "patch_everything")


@pytest.mark.skipif("TRANSFORMERS_SOURCE" not in os.environ, reason="TRANSFORMERS_SOURCE names no source tree")
def test_every_test_of_theirs_that_passes_passes_patched(tmp_path):
    assert broken_by_patching(Path(os.environ["TRANSFORMERS_SOURCE"]), tmp_path) <= EXCEPTIONS.keys()


def test_the_hook_finds_what_patching_breaks(tmp_path):
    file = tmp_path / TESTS
    file.parent.mkdir(parents=True)
    file.write_text(
        """
from transformers import BertConfig, BertForMaskedLM, BertModel

CONFIG = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)

def test_that_stays():
    assert BertForMaskedLM(CONFIG).bert.config is CONFIG

def test_that_is_broken():
    import bertfast
    bertfast.patch(BertModel(CONFIG))  # which a patched one refuses

def test_that_always_fails():
    raise SystemError
"""
    )
    assert broken_by_patching(tmp_path, tmp_path) == {"test_that_is_broken"}
