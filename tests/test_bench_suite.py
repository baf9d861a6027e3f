"""`make bench` measures what is missing or out of date, and nothing else."""

import json
import subprocess
from pathlib import Path

import pytest

from bench import suite
from bench.harness import processor


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
    assert suite.machine_folder(tmp_path).parent == tmp_path
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "old.json").write_text(json.dumps({"origin": {"processor": processor()}}))
    (tmp_path / "broken.json").write_text("{")
    assert suite.machine_folder(tmp_path) == tmp_path / "mine"


def test_parts_that_cannot_run_say_what_is_missing(tmp_path):
    folders = dict.fromkeys(("data", "model", "results"), tmp_path / "nowhere")
    assert suite.reason_to_skip(suite.PARTS["inference"], folders) == f"there is no {tmp_path / 'nowhere'} (--data)"
    assert suite.reason_to_skip(suite.PARTS["ceilings"], folders) is None
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
