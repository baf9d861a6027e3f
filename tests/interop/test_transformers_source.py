"""Hugging Face's tests, in a source tree of transformers (TRANSFORMERS_SOURCE), on fused models."""

import functools
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SUITES = (
    "bert",
    "roberta",  # the suites of its relatives need downloads
    "electra",
    "distilbert",
    "modernbert",
    "nomic_bert",
    "eurobert",
    "dpr",
    "encoder_decoder",
    "vision_text_dual_encoder",
    "vision_encoder_decoder",
    "speech_encoder_decoder",
    "grounding_dino",
)
# pytest plugins that fuse models: each on construction, or by replacing classes.
PLUGINS = ("patch_everything", "replace_classes")
# Tests that pass with transformers' models and may fail with fused ones, and the entry of "what differs" that says so.
EXCEPTIONS: dict[str, str] = {}


def passed(source: Path, suite: str, report: Path, *options: str) -> set[str]:
    """Return the tests that pass in a suite of a source tree, as CLASS::TEST."""
    tests = Path("tests", "models", suite, f"test_modeling_{suite}.py")
    paths = [str(source), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests), f"--junitxml={report}"]
    ran = subprocess.run([*command, *options], cwd=source, env=environment, capture_output=True, text=True)
    print(ran.stdout[-20_000:], ran.stderr[-5_000:])  # pytest shows it where the test fails
    assert report.is_file(), f"the tests in {source / tests} did not run: {ran.stderr[-2_000:]}"
    cases = ElementTree.parse(report).iter("testcase")
    good = (case for case in cases if not any(child.tag != "properties" for child in case))
    return {f"{case.get('classname').rpartition('.')[2]}::{case.get('name')}" for case in good}


@functools.cache
def passed_unfused(source: Path, suite: str) -> set[str]:
    """Return the tests that pass in a suite of a source tree with transformers' models."""
    with tempfile.TemporaryDirectory() as folder:
        found = passed(source, suite, Path(folder, "report.xml"))
    assert found, f"no test of {suite} in {source} passes"
    return found


def broken_by_fusing(source: Path, suite: str, folder: Path, plugin: str) -> set[str]:
    """Return the tests that pass with transformers' models and fail with fused ones."""
    return passed_unfused(source, suite) - passed(source, suite, folder / f"{suite}-{plugin}.xml", "-p", plugin)


@pytest.mark.skipif("TRANSFORMERS_SOURCE" not in os.environ, reason="TRANSFORMERS_SOURCE names no source tree")
@pytest.mark.parametrize("plugin", PLUGINS)
@pytest.mark.parametrize("suite", SUITES)
def test_each_test_that_passes_with_transformers_passes_fused(suite, plugin, tmp_path):
    source = Path(os.environ["TRANSFORMERS_SOURCE"])
    assert broken_by_fusing(source, suite, tmp_path, plugin) <= EXCEPTIONS.keys()


@pytest.mark.parametrize("plugin", PLUGINS)
def test_the_hook_finds_what_fusing_breaks(plugin, tmp_path):
    file = tmp_path / "tests" / "models" / "bert" / "test_modeling_bert.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        """
from transformers import BertConfig, BertForMaskedLM, BertModel

CONFIG = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)

class TestBert:
    def test_that_stays(self):
        assert BertForMaskedLM(CONFIG).bert.config is CONFIG

    def test_that_is_broken(self):
        assert type(BertModel(CONFIG)).__module__ == "transformers.models.bert.modeling_bert"

    def test_that_always_fails(self):
        raise SystemError
"""
    )
    assert broken_by_fusing(tmp_path, "bert", tmp_path, plugin) == {"TestBert::test_that_is_broken"}
