"""`bertfast compare` prints and draws several runs."""

import json

import pytest
from runs import settings_for
from sentiment import QUICK

from bertfast.cli.compare_runs import ComparedRun
from bertfast.cli.main import main
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.pretraining import pretrain

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tuned_runs(pretrained, files, tmp_path_factory):
    """Return the folder of the runs a and b, of two learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", 3e-3), ("b", 1e-5)):
        values = {"model_name_or_path": str(pretrained), "output_dir": str(folder / name), "logging_steps": 5}
        finetune(FinetuneSettings.of(**values, **files, **QUICK | {"learning_rate": rate}))
    return folder


def test_results_and_differing_settings_of_runs_are_printed_and_drawn(tuned_runs, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tuned_runs)
    assert main(["compare", "a", "b", "--plot", "both.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["run", "steps", "training", "loss", "best", "accuracy", "at", "step"]
    for name, line in zip("ab", lines[1:3], strict=True):
        results = json.loads((tuned_runs / name / "all_results.json").read_text())
        run, steps, _, best, _ = line.split()
        assert (run, steps) == (name, "60")
        assert float(best) == pytest.approx(results["eval_accuracy"], abs=1e-5)
    assert lines[4].split() == ["setting", "a", "b"]
    assert [line.split() for line in lines[5:-2]] == [["--learning-rate", "0.003", "1e-05"]]
    assert lines[-1] == "plot written to both.png"
    assert (tuned_runs / "both.png").stat().st_size > 5000


def test_pre_training_runs_are_compared_by_their_validation_loss(data, tmp_path, capsys):
    for name, rate in (("a", 1e-2), ("b", 1e-3)):
        pretrain(settings_for(tmp_path / name, data, max_steps=4, eval_steps=2, learning_rate=rate))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "best validation_loss" in out
    assert "--learning-rate" in out
    entries = ComparedRun.open(str(tmp_path / "a")).entries
    best = min(entry["validation_loss"] for entry in entries if "validation_loss" in entry)
    assert f"{best:.6g}" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "a"], "a is given more than once: name different runs"),
        (["a", "nowhere"], "nowhere is not the output folder of a run of `bertfast finetune` or `bertfast pretrain`"),
        (["a", "empty"], "empty has no metrics yet: wait until a step has been logged, or lower --logging-steps"),
        (["a", "other"], "a is a run of `bertfast finetune`, and other one of `bertfast pretrain`: compare runs of"),
        (["a", "b", "--plot", "x.pdf"], "--plot must be a .png file in a folder that exists, got x.pdf"),
    ],
)
def test_what_cannot_be_compared_is_refused(arguments, message, tuned_runs, capsys, monkeypatch):
    monkeypatch.chdir(tuned_runs)
    record = json.loads((tuned_runs / "a" / "origin.json").read_text())
    for name, command in (("empty", "finetune"), ("other", "pretrain")):
        (tuned_runs / name).mkdir(exist_ok=True)
        (tuned_runs / name / "origin.json").write_text(json.dumps(record | {"command": command}))
    (tuned_runs / "other" / "metrics.jsonl").write_text('{"step": 1}\n')
    assert main(["compare", *arguments]) == 1
    assert message in capsys.readouterr().err
