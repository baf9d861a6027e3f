"""`make bench` measures what is missing or out of date, and nothing else."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import arguments, result_files, suite
from bench.end_to_end import inference
from bertfast.runtime.machine import processor


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with a source file, in which the suite believes to be."""
    monkeypatch.setattr(suite, "ROOT", tmp_path)
    for name in ("bertfast/model.py", "bench/harness.py", "bench/page/text.py", "docs/page.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("first")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=test", "-c", "user.email=test@example.org", "-C", str(folder), *arguments]
    return subprocess.check_output(command, text=True).strip()


def commit(folder: Path) -> None:
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "change")


def result(checkout: Path, **origin: str) -> Path:
    """Write a result of the current commit and this processor."""
    file = checkout / "bench" / "results" / "part.json"
    file.parent.mkdir(exist_ok=True)
    measured = {"commit": git(checkout, "rev-parse", "--short=12", "HEAD"), "processor": processor()}
    file.write_text(json.dumps({"origin": measured | origin}))
    return file


def test_a_result_is_up_to_date_until_what_it_measures_changes(checkout):
    file = result(checkout)
    assert suite.up_to_date(file)
    for name in ("docs/page.md", "bench/page/text.py"):  # neither is measured
        (checkout / name).write_text("second")
        commit(checkout)
    assert suite.up_to_date(file)
    (checkout / "bertfast" / "model.py").write_text("second")
    assert not suite.up_to_date(file)  # not even committed
    commit(checkout)
    assert not suite.up_to_date(file)
    assert suite.up_to_date(result(checkout))


@pytest.mark.parametrize(
    "origin", [{"processor": "another"}, {"commit": "0123456789ab+changes"}, {"commit": "0123456789ab"}]
)
def test_results_of_other_machines_and_unknown_commits_are_measured_again(origin, checkout):
    assert not suite.up_to_date(result(checkout, **origin))
    assert not suite.up_to_date(checkout / "missing.json")


def test_results_of_a_processor_share_a_folder(tmp_path):
    assert result_files.machine_folder(tmp_path).parent == tmp_path
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old.json").write_text(json.dumps({"origin": {"processor": processor()}}))
    (tmp_path / "broken.json").write_text("{")
    assert result_files.machine_folder(tmp_path) == tmp_path / "mine"


def test_a_folder_with_results_of_another_processor_is_never_chosen(tmp_path):
    def write(name: str, owner: str) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps({"origin": {"processor": owner}}))

    for name, owner in (("a.json", processor()), ("b.json", "other"), ("mixed/a.json", processor())):
        write(name, owner)
    assert result_files.machine_folder(tmp_path) == tmp_path / "mixed"
    write("mixed/b.json", "other")
    new = result_files.machine_folder(tmp_path)  # neither the folder of all results nor the one of two CPUs
    assert new not in (tmp_path, tmp_path / "mixed")
    write(f"{new.name}/a.json", "another processor with a similar name")
    assert result_files.machine_folder(tmp_path) == tmp_path / f"{new.name}-2"
    for name in ("few/a.json", "many/a.json", "many/b.json"):
        write(name, processor())
    assert result_files.machine_folder(tmp_path) == tmp_path / "many"


def test_the_results_of_this_repository_have_a_folder_per_processor():
    folders = {}
    for file in result_files.RESULTS.rglob("*.json"):
        if file.parent != result_files.RESULTS:
            folders.setdefault(file.parent, set()).add(result_files.origin_of(file).get("processor"))
    assert all(len(owners) == 1 for owners in folders.values()), folders


def test_programs_write_to_the_folder_of_the_processor_unless_the_page_shows_their_result_once(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")  # argparse breaks lines after hyphens, so within the names of folders, too
    assert arguments.result_parser(None).parse_args([]).results == result_files.machine_folder()
    once = ("instructions", "end_to_end.curve_parity", "end_to_end.residual_precision", "end_to_end.real_runs")
    for name, folder in [*((name, result_files.RESULTS) for name in once), ("ceilings", result_files.machine_folder())]:
        monkeypatch.setattr(sys, "argv", [name, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(f"bench.{name}").main()
        assert f"(default: {folder.relative_to(result_files.ROOT)})" in " ".join(capsys.readouterr().out.split())


def test_missing_runtimes_are_named_before_anything_is_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(inference, "INSTALLED_RUNTIMES", ("json", "no_such_runtime"))
    inference.require_runtimes(tmp_path)
    with pytest.raises(SystemExit, match=r"without no_such_runtime, because .* or name another folder with --results"):
        inference.require_runtimes(result_files.RESULTS / "avx512")
    monkeypatch.setattr(suite, "missing_runtimes", lambda: ["no_such_runtime"])
    monkeypatch.setattr(sys, "argv", ["suite", "--plan", "ceilings", "--results", str(tmp_path)])
    suite.main()
    assert "results would lack no_such_runtime" in capsys.readouterr().err


def test_parts_are_named_as_they_are_typed(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["suite", "--plan", "step"])
    with pytest.raises(SystemExit):
        suite.main()
    assert "unknown part 'step': choose from 'ceilings', 'step, base', 'step, base, bf16', " in capsys.readouterr().err


def test_parts_that_cannot_run_say_what_is_missing(tmp_path):
    folders = dict.fromkeys(("data", "model", "results"), tmp_path / "nowhere")
    assert suite.reason_to_skip(suite.PARTS["inference"], folders) == f"there is no {tmp_path / 'nowhere'} (--data)"
    assert suite.reason_to_skip(suite.PARTS["ceilings"], folders) is None
    lacking = dataclasses.replace(suite.PARTS["ceilings"], packages=("json", "no_such_package"))
    assert suite.reason_to_skip(lacking, folders) == "no_such_package not installed"
    assert suite.minutes_of(suite.DEFAULT) <= 40
    assert not any(suite.PARTS[name].by_name for name in suite.DEFAULT)
    assert set(suite.DEFAULT) < set(suite.PARTS)


def test_the_time_that_is_left_follows_the_parts_that_ran(tmp_path, monkeypatch, capsys):
    commands = []

    def ended(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(command, int("ceilings" in command[2]))

    monkeypatch.setattr(suite.subprocess, "run", ended)
    folders = dict.fromkeys(("data", "model", "results"), tmp_path)
    assert suite.run(["ceilings", "memory"], folders) == ["ceilings"]
    assert commands[1][-2:] == ["--results", str(tmp_path)]
    assert "memory ended after 0.0 min; about 0 min left" in capsys.readouterr().out
