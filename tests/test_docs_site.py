"""The documentation site builds: its links and anchors exist, and every module has a page of reference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    finished = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize("module", ["bertfast", "bertfast.ops.attention", "bertfast.kernels.attention"])
def test_a_module_has_a_page_of_reference(site, module):
    page = (site / "reference" / module / "index.html").read_text(encoding="utf-8")
    assert "doc-object" in page


def test_guides_link_to_pages_of_the_site_and_to_files_of_the_repository(site):
    index = (site / "index.html").read_text(encoding="utf-8")
    assert 'href="BENCHMARKS/"' in index
    assert "/blob/main/examples" in index
