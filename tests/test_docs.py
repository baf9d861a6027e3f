"""README and docs: Python blocks run, `bertfast` commands parse, and links and file names exist."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bertfast.cli import main as cli
from bertfast.data.special_tokens import BERT_TOKENS, ROBERTA_TOKENS
from bertfast.tasks.registry import choose_task
from bertfast.tasks.settings import TaskSettings
from build_support.cuda_toolkit import OLDEST_NVCC

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

PYTHON = [(name, body) for name, text in TEXTS.items() for kind, body in BLOCK.findall(text) if kind == "python"]


def commands(text: str) -> list[str]:
    """Return the `bertfast …` command lines of shell blocks, without comments and with continued lines joined."""
    lines = [
        line for kind, body in BLOCK.findall(text) if kind != "python" for line in body.replace("\\\n", "").splitlines()
    ]
    found = [re.search(r"^(?:.*\$\(which bertfast\)|bertfast)\s+(.*)$", line) for line in lines]
    return [match[1] for match in found if match and "…" not in match[1]]


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


COMMANDS = [pytest.param(name, line, id=f"{name}: {line}") for name, text in TEXTS.items() for line in commands(text)]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> Path:
    """Return a folder with a tiny BERT under the name that the documents use."""
    from bertfast import BertModel, preset_config
    from bertfast.data.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("docs")
    model = folder / "sentence-transformers" / "all-MiniLM-L6-v2"
    tokenizer = train_tokenizer(["A short text. A text that is a little longer."] * 20, 128)
    BertModel(preset_config("tiny", vocab_size=tokenizer.get_vocab_size())).save_pretrained(model)
    save_tokenizer(tokenizer, model)
    return folder


@pytest.mark.parametrize(("page", "body"), PYTHON, ids=[f"{page}-{i}" for i, (page, _) in enumerate(PYTHON)])
def test_python_block_runs(page, body, tiny_models, monkeypatch):
    monkeypatch.chdir(tiny_models)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    exec(compile(body, page, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(("page", "line"), COMMANDS)
def test_command_line_is_valid(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    name, *arguments = shlex.split(line.split(" <")[0], comments=True)
    if name == "--version":
        assert cli.main(["--version"]) == 0
        return
    assert name in cli.COMMANDS, f"{page}: unknown command {name}"
    module, settings, *_ = cli.COMMANDS[name]
    parsed = cli.parse(name, getattr(importlib.import_module(f"bertfast.{module}"), settings), arguments)
    if isinstance(parsed, TaskSettings):
        choose_task(parsed)  # raises ValueError for an unknown task


@pytest.mark.parametrize("page", TEXTS)
def test_relative_links_and_files_exist(page):
    text = BLOCK.sub("", TEXTS[page])
    missing = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if "://" not in link and not (target.exists() and (not anchor or anchor in anchors(target))):
            missing.append(link)
    roots = r"(?:kernels|csrc|bertfast|bench|tests|docs|examples|recipes|build_support)"
    named = re.findall(rf"`({roots}/[\w./*-]+\.\w+)`", text)
    missing += [name for name in named if not list(ROOT.glob(name))]
    assert not missing, f"{page} names what does not exist: {missing}"


def test_oldest_nvcc_is_the_one_that_the_build_accepts():
    named = {version for text in TEXTS.values() for version in re.findall(r"nvcc\s+([\d.]+)\s+or\s+later", text)}
    assert named == {".".join(map(str, OLDEST_NVCC))}


def test_only_the_readme_says_what_has_run_on_a_gpu():
    claims = [name for name, text in TEXTS.items() if re.search(r"run\s+on\s+a\s+GPU\s+yet", text)]
    assert claims == ["README.md"]


def test_recipes_of_the_package_are_named_without_a_path():
    recipes = "|".join(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
    assert not [name for name, text in TEXTS.items() if re.search(rf"--config[ =]recipes/(?:{recipes})\.yaml", text)]


def test_the_readme_is_short():
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120
    assert len(TEXTS["README.md"].split()) <= 1300


def test_the_guides_name_the_limits_of_families():
    pretraining, compatibility = (
        " ".join(TEXTS[f"docs/{page}.md"].split()) for page in ("PRETRAINING", "COMPATIBILITY")
    )
    assert "base of every family, large of every family but DistilBERT" in pretraining
    assert (
        "`tokenizer.json` of these kinds with [special tokens that are found](COMPATIBILITY.md#tokenizers)"
        in pretraining
    )
    assert "or a `tokenizer.json` whose [special tokens are found](#tokenizers)" in compatibility
    section = compatibility.partition("### Tokenizers")[2].partition(" ## ")[0]
    assert all(f"`{token}`" in section for token in [*BERT_TOKENS.values(), *ROBERTA_TOKENS.values()])
