"""Every command that writes a folder keeps a second run out of it, and names a folder that cannot be written."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sentiment import write_sentiment

from bertfast.cli.main import main
from bertfast.runtime import output_folder
from bertfast.runtime.output_folder import locked_folder

COMMANDS = ("demo", "embed", "evaluate", "export", "finetune", "prepare", "pretrain", "reproduce", "sweep")


@pytest.fixture
def arguments(pretrained, tmp_path):
    """Return a function from a command to its arguments, which write to tmp_path/out."""
    file = str(write_sentiment(tmp_path / "a.tsv", 8, seed=0))
    (tmp_path / "data" / "glue" / "SST-2").mkdir(parents=True)
    for split in ("train", "dev"):
        shutil.copyfile(file, tmp_path / "data" / "glue" / "SST-2" / f"{split}.tsv.gz")
    (tmp_path / "data" / "corpus").mkdir()
    (tmp_path / "data" / "corpus" / "a-train.txt.xz").write_text("A text.\n")
    text = tmp_path / "a.txt"
    text.write_text("\n\n".join(f"Line {number} is here.\nAnother follows." for number in range(30)))
    model, out = str(pretrained), str(tmp_path / "out")
    tuning = ["--model-name-or-path", model, "--train-file", file, "--validation-file", file, "--output-dir", out]
    return {
        "demo": ["--output-dir", out],
        "embed": ["--model-name-or-path", model, "--input-file", file, "--output-dir", out],
        "evaluate": [
            "--model-name-or-path",
            model,
            "--validation-file",
            str(text),
            "--objective",
            "mlm",
            "--output-dir",
            out,
        ],
        "export": [model, out],
        "finetune": tuning,
        "prepare": ["--train-file", str(text), "--tokenizer-name", model, "--output-dir", out],
        "pretrain": ["--train-file", str(text), "--tokenizer-name", model, "--output-dir", out, "--device", "cpu"],
        "reproduce": ["--table", "1", "--data", str(tmp_path / "data"), "--only", "SST-2", "--output-dir", out],
        "sweep": tuning,
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_in_use_is_refused(command, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    with locked_folder(out):
        before = sorted(out.iterdir())
        assert main([command, *arguments[command]]) == 1
        assert sorted(out.iterdir()) == before
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{out} is in use by process {os.getpid()} on " in error


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_output_of_another_command_is_refused(command, overwrite, arguments, tmp_path, capsys):
    out = tmp_path / "out"
    with output_folder.output_folder(out, output_folder.Origin(command="import"), ()):
        (out / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in out.iterdir()}
    assert main([command, *arguments[command], *["--overwrite-output-dir"] * overwrite]) == 1
    assert f"{out} belongs to `bertfast import`: choose another --output-dir, or delete" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("command", COMMANDS)
def test_a_read_only_folder_is_named_in_one_sentence(command, arguments, tmp_path, capsys, monkeypatch):
    def refuse(self: Path, *arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)  # as root, no folder is read-only
    assert main([command, *arguments[command]]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error == f"bertfast {command}: {tmp_path / 'out'} cannot be written: Permission denied"


def test_results_of_another_evaluation_are_refused_and_replaced_on_request(arguments, tmp_path, capsys):
    command, results = ["evaluate", *arguments["evaluate"]], tmp_path / "out" / "eval_results.json"
    assert main(command) == 0
    first = results.read_text()
    assert main(command) == 0
    assert results.read_text() == first
    capsys.readouterr()
    assert main([*command, "--max-seq-length", "16"]) == 1
    assert "--max-seq-length was null and is 16: " in capsys.readouterr().err
    assert results.read_text() == first
    assert main([*command, "--max-seq-length", "16", "--overwrite-output-dir"]) == 0
    assert results.read_text() != first


def test_a_refused_run_leaves_no_folders(arguments, tmp_path):
    nested = tmp_path / "new" / "below" / "out"
    assert main(["finetune", *arguments["finetune"], "--output-dir", str(nested), "--task", "question-answering"]) == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("limit", [200, 5_000, 40_000])  # reached by the record, the tokenizer or the shards
def test_prepare_on_a_full_disk_is_refused_in_one_sentence_and_leaves_nothing(limit, pretrained, tmp_path, capsys):
    text, out = tmp_path / "a.txt", tmp_path / "out"
    text.write_text("\n\n".join("it was a good day\n" * 40 for _ in range(300)))
    arguments = ["prepare", "--train-file", str(text), "--tokenizer-name", str(pretrained), "--output-dir", str(out)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        assert main(arguments) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert " cannot be written: File too large: the shell (`ulimit -f`) or the file system limits" in error
    assert not out.exists()
    assert main(arguments) == 0


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name, without hidden ones."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}


SHORT = ["--preset", "tiny", "--max-steps", "1", "--max-seq-length", "32", "--tokens-per-batch", "256"]
GRID = ["--learning-rates", "1e-4", "--batch-sizes", "8", "--epochs", "1"]
REFUSED = {  # flags of a first run, those of a run that is refused late, and why
    "embed": (["--pooling", "cls"], ["--text-column", "absent"], "no column 'absent'"),
    "evaluate": ([], ["--validation-file", "EMPTY"], "no text"),
    "export": ([], ["DAMAGED", "OUT"], "damaged"),
    "finetune": (["--num-train-epochs", "1"], ["--train-file", "EMPTY"], "EMPTY"),
    "prepare": ([], ["--train-file", "EMPTY"], "no text"),
    "pretrain": (SHORT, ["--train-file", "OTHER", *SHORT[:-1], "100000000"], "does not fit into memory"),
    "sweep": (GRID, [*GRID, "--train-file", "EMPTY"], "EMPTY"),
}


@pytest.mark.parametrize("command", REFUSED)
def test_overwriting_loses_nothing_before_all_checks(command, arguments, pretrained, tmp_path, capsys):
    first, refused, message = REFUSED[command]
    out, damaged = tmp_path / "out", tmp_path / "damaged"
    assert main([command, *arguments[command], *first]) == 0
    before = contents(out)
    shutil.copytree(pretrained, damaged)
    (damaged / "model.safetensors").write_bytes((pretrained / "model.safetensors").read_bytes()[:-1])
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "other.txt").write_text("\n\n".join(f"Another line {number}.\nIt goes on." for number in range(30)))
    empty = tmp_path / f"empty.{'txt' if command in ('evaluate', 'prepare') else 'tsv'}"
    names = {"EMPTY": str(empty), "OTHER": str(tmp_path / "other.txt"), "DAMAGED": str(damaged), "OUT": str(out)}
    refused, message = [names.get(word, word) for word in refused], names.get(message, message)
    usual = [] if command == "export" else arguments[command]  # positional arguments cannot be repeated
    capsys.readouterr()
    assert main([command, *usual, *refused, "--overwrite-output-dir"]) == 1
    assert message in capsys.readouterr().err
    assert {name: text for name, text in contents(out).items() if not name.startswith("data-new")} == before
    if command == "pretrain":
        assert main([command, *usual, "--train-file", names["OTHER"], *SHORT, "--overwrite-output-dir"]) == 0
        assert not (out / "data-new").exists()
        assert "other.txt" in (out / "data" / "origin.json").read_text()


@pytest.mark.slow
def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(arguments, tmp_path):
    command = [sys.executable, "-m", "bertfast", "finetune", *arguments["finetune"], "--num-train-epochs", "1000000"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as first:
        try:
            while not (tmp_path / "out" / "metrics.jsonl").exists():
                assert first.poll() is None
            second = subprocess.run(command, capture_output=True, text=True)
            assert second.returncode == 1
            assert second.stderr.strip().endswith(
                f"process {first.pid} on {os.uname().nodename}: wait for its end, or choose another --output-dir"
            )
        finally:
            first.kill()
    assert main(["finetune", *arguments["finetune"], "--num-train-epochs", "1", "--overwrite-output-dir"]) == 0
