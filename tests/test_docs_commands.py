"""Shell blocks of README and docs: `bertfast` commands run on tiny data; make, pip and bench lines name what exists."""

import argparse
import importlib
import os
import re
import shlex
import tomllib

import pytest
import torch
from task_examples import write_examples
from test_docs import BLOCK, COMMANDS, ROOT, TEXTS
from text_pairs import write_pairs

from bertfast.cli import main as cli

pytestmark = pytest.mark.slow

TEXT = "return the number of elements in an array while Paris is the capital of France and it is far"
MODEL = "num_hidden_layers=1,hidden_size=32,num_attention_heads=2,intermediate_size=64"
PRETRAIN = [
    "--max-steps",
    "2",
    "--tokens-per-batch",
    "1024",
    "--gradient-accumulation-steps",
    "4",
    "--vocab-size",
    "320",  # no less is possible with bytes
]
PRETRAIN += ["--precision", "fp32", "--device", "cpu", "--eval-batches", "1"]
# Flags that make the run of a command short.
SHORT = {
    "prepare": ["--vocab-size", "320", "--processes", "1"],
    "pretrain": PRETRAIN,
    "finetune": ["--num-train-epochs", "1", "--device", "cpu"],
    "sweep": ["--learning-rates", "1e-3", "--batch-sizes", "16", "--epochs", "1", "--seeds", "1", "--device", "cpu"],
    "verify": ["--texts", "4", "--device", "cpu"],
    "bench": ["--texts", "4", "--seconds", "0.1", "--device", "cpu"],
    "embed": ["--device", "cpu"],
    "search": ["--device", "cpu"],
}
# Commands that test_docs.py only parses.
NOT_RUN = {
    "demo": "takes minutes",
    "doctor": "tests/cli/test_doctor.py runs it",
    "import": "requires a TensorFlow checkpoint; tests/convert runs it",
    "reproduce": "requires the tasks' data; tests/cli/test_reproduce.py runs it",
}
NEEDS = {"export": ("onnx", "onnxruntime", "onnxscript"), "bench": ("matplotlib",)}


def runnable() -> list:
    """Return the documented command lines that run here, each once, as (arguments, file on standard input)."""
    found = {}
    for line in dict.fromkeys(parameter.values[1] for parameter in COMMANDS):
        command, _, source = line.partition(" <")
        arguments = shlex.split(command, comments=True)
        if arguments[0] not in {*NOT_RUN, "--version"}:
            found[" ".join(arguments) + source] = pytest.param(arguments, source.strip(), id=line)
    return list(found.values())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with every file and model that the documented commands read."""
    from bertfast import BertForPreTraining, preset_config
    from bertfast.data.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("commands")
    words = TEXT.split()
    texts = [" ".join(words[row % 7 :] + words[: row % 5]).capitalize() + "." for row in range(200)]
    (folder / "text").mkdir()
    for name in ("text/one.txt", "text/two.txt"):
        (folder / name).write_text("\n".join("\n".join(texts[row : row + 4]) + "\n" for row in range(0, 200, 4)))
    for name in ("text.txt", "texts.txt", "mine.txt", "sentences.txt", "queries.txt"):
        (folder / name).write_text("\n".join(texts[:20]) + "\n")
    (folder / "sentences.tsv").write_text("\n".join(["sentence", *texts[:20]]) + "\n")
    for target, task in [
        ("train.tsv", "sequence-classification"),
        ("dev.tsv", "sequence-classification"),
        ("train.json", "question-answering"),
        ("train.conll", "token-classification"),
    ]:
        write_examples(folder, task, 24, seed=0).rename(folder / target)
    for name in ("pairs.tsv", "dev-pairs.tsv"):
        write_pairs(folder / name, "pairs", 24)
    for name in ("rankings.tsv", "dev-rankings.tsv"):
        write_pairs(folder / name, "triplets", 24)
    tokenizer = train_tokenizer(texts, 96)
    config = preset_config("tiny", vocab_size=tokenizer.get_vocab_size(), num_hidden_layers=1)
    torch.manual_seed(0)
    for name in ("bert", "demo/model"):
        BertForPreTraining(config).save_pretrained(folder / name)
        save_tokenizer(tokenizer, folder / name)
    for line in (
        "prepare --output-dir shards --train-file text/ --vocab-size 96 --processes 1",
        "finetune --model-name-or-path bert --train-file train.tsv --output-dir tuned --max-steps 1 --logging-steps 1",
        "finetune --model-name-or-path bert --train-file dev.tsv --output-dir tuned-b --max-steps 2 --logging-steps 1",
        "finetune --task reranking --model-name-or-path bert --train-file rankings.tsv --output-dir tuned-reranker",
        "embed --model-name-or-path bert --input-file texts.txt --output-dir documents --output-precision int8",
    ):
        before = os.getcwd()
        os.chdir(folder)
        try:
            assert cli.main(shlex.split(line)) in (0, None)
        finally:
            os.chdir(before)
    return folder


@pytest.mark.parametrize(("arguments", "source"), runnable())
def test_documented_command_runs(arguments, source, files, tmp_path, monkeypatch, pipe):
    name = arguments[0]
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    outputs = {"vectors", "out", arguments[arguments.index("--output-dir") + 1] if "--output-dir" in arguments else ""}
    for path in files.iterdir():
        if path.name not in outputs:
            (tmp_path / path.name).symlink_to(path)
    if source:
        pipe((files / source).read_text())
    short = list(SHORT.get(name, ()))
    if name == "pretrain" and "--init-from" not in arguments:
        short += ["--config-overrides", MODEL]
    if "--data-dir" in arguments or "--init-from" in arguments:
        at = short.index("--vocab-size")
        del short[at : at + 2]
    assert cli.main([*arguments, *short]) in (0, None)


def shell_lines() -> list[tuple[str, str]]:
    """Return (page, line) of all lines of shell blocks, without comments and with continued lines joined."""
    blocks = ((page, body) for page, text in TEXTS.items() for kind, body in BLOCK.findall(text) if kind != "python")
    return [(page, line.split("  #")[0]) for page, body in blocks for line in body.replace("\\\n", "").splitlines()]


LINES = shell_lines()
INLINE = [(page, code) for page, text in TEXTS.items() for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text))]


def test_make_targets_and_variables_exist():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    variables = set(re.findall(r"\b([A-Z_]+) *[?:]?=", makefile)) | set(re.findall(r"\$\((\w+)", makefile))
    calls = [code for _, code in (*LINES, *INLINE) if code.startswith("make ")]
    words = {word for code in calls for word in code.split()[1:] if word != "…"}
    assert {word for word in words if "=" not in word} <= targets
    assert {word.partition("=")[0] for word in words if "=" in word} <= variables


def test_extras_in_pip_lines_are_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    calls = [code for _, code in (*LINES, *INLINE) if code.startswith("pip install")]
    extras = {
        extra for code in calls for listed in re.findall(r"'\.\[([\w,-]+)\]'", code) for extra in listed.split(",")
    }
    assert len(calls) > 3
    assert extras <= project["project"]["optional-dependencies"].keys()
    known = [*project["build-system"]["requires"], *project["project"]["optional-dependencies"]["cuda-build"]]
    packages = [word for code in calls for word in shlex.split(code)[2:] if word[0] not in "-."]
    assert {re.split(r"[\[>=]", name)[0] for name in packages} <= {re.split(r"[\[>=]", name)[0] for name in known}


class ParsedError(Exception):
    """The arguments were valid."""


BENCH = [line for _, line in LINES if "python -m bench." in line]


@pytest.mark.parametrize("line", BENCH)
def test_bench_arguments_are_valid(line, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def only_parse(parser):
        parse_args(parser)
        raise ParsedError

    module, *arguments = shlex.split(line.partition("python -m ")[2])
    monkeypatch.setattr("sys.argv", [module, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", only_parse)
    with pytest.raises(ParsedError):
        importlib.import_module(module).main()


MENTIONED = sorted({code for _, code in INLINE if re.match(r"bertfast [a-z]+ .*--", code)})


@pytest.mark.parametrize("code", MENTIONED)
def test_flags_of_commands_in_sentences_exist(code, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([code.split()[1], "--help"])
    assert ended.value.code == 0
    help_text = capsys.readouterr().out
    assert [flag for flag in re.findall(r"--[\w-]+", code) if flag not in help_text] == []
