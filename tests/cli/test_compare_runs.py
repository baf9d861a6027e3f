"""`bertfast compare` prints and draws several runs."""

import json
from pathlib import Path

import pytest
from runs import settings_for, stopped_at
from sentiment import QUICK
from task_examples import settings_for as task_settings
from task_examples import write_examples

from bertfast.cli.compare_runs import ComparedRun
from bertfast.cli.main import main
from bertfast.runtime.signals import RunStopped
from bertfast.training import report_plots
from bertfast.training.finetuning import FinetuneSettings, finetune
from bertfast.training.pretraining import pretrain

INPUTS = {
    "--model-name-or-path": [("models/bert/config.json", "c0"), ("models/bert/model.safetensors", "a1")],
    "--train-file": [("data/train.tsv", "b2")],
}


def write_run(folder: Path, *, inputs: dict | None = None, finished: bool = True, metric: str = "accuracy", **values):
    """Write what `compare` reads of a run of `bertfast finetune`.

    Args:
        folder: Folder of the run.
        inputs: Names of files and the beginnings of their hashes, by flag.
        finished: Whether there is a run.json.
        metric: Metric that decides.
        values: `entries` of metrics.jsonl, `settings` by flag, and entries of run.json.
    """
    folder.mkdir(parents=True)
    files = {
        flag: [
            {"path": f"/{path}", "bytes": 1, "modified": 1, "sha256": start and start.ljust(64, "0")}
            for path, start in found
        ]
        for flag, found in (INPUTS | (inputs or {})).items()
    }
    record = {"command": "finetune", "inputs": files, "settings": values.pop("settings", {})}
    (folder / "origin.json").write_text(json.dumps(record))
    entries = values.pop("entries", [{"step": 4, "loss": 0.5, f"eval_{metric}": 0.75}])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    if finished:
        (folder / "run.json").write_text(json.dumps({"metric_for_best_model": metric, "results": {}} | values))


@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
    """Return a function that compares runs below the current folder, and returns the lines that are printed."""
    monkeypatch.chdir(tmp_path)

    def lines_of(*names: str) -> list[str]:
        capsys.readouterr()
        assert main(["compare", *names]) == 0
        return capsys.readouterr().out.splitlines()

    return lines_of


@pytest.fixture(scope="module")
def tuned_runs(pretrained, files, tmp_path_factory):
    """Return the folder of the runs a and b, of two learning rates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, rate in (("a", 3e-3), ("b", 1e-5)):
        values = {"model_name_or_path": str(pretrained), "output_dir": str(folder / name), "logging_steps": 5}
        finetune(FinetuneSettings.of(**values, **files, **QUICK | {"learning_rate": rate}))
    return folder


@pytest.mark.slow
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
    assert lines[4].split() == ["input", "or", "setting", "a", "b"]
    assert [line.split() for line in lines[5:-2]] == [["--learning-rate", "0.003", "1e-05"]]
    assert lines[-1] == "plot written to both.png"
    assert (tuned_runs / "both.png").stat().st_size > 5000


@pytest.mark.slow
def test_pre_training_runs_are_compared_by_their_validation_loss(data, tmp_path, capsys):
    for name, rate in (("a", 1e-2), ("b", 1e-3)):
        pretrain(settings_for(tmp_path / name, data, max_steps=4, eval_steps=2, learning_rate=rate))
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--plot", str(tmp_path / "x.png")]) == 0
    out = capsys.readouterr().out
    assert "best validation_loss" in out
    assert "--learning-rate" in out
    assert "unfinished" not in out
    entries = ComparedRun.open(str(tmp_path / "a")).entries
    best = min(entry["validation_loss"] for entry in entries if "validation_loss" in entry)
    assert f"{best:.6g}" in out


@pytest.mark.parametrize(
    ("inputs", "rows"),
    [
        ({}, []),
        ({"--train-file": [("elsewhere/same.tsv", "b2")]}, []),
        ({"--train-file": [("new/train.tsv", "b3")]}, ["--train-file  train.tsv b2000000  train.tsv b3000000"]),
        ({"--validation-file": [("dev.tsv", "")]}, ["--validation-file  none  dev.tsv unknown"]),
        (
            {"--model-name-or-path": [("x/roberta/config.json", "c0"), ("x/roberta/model.safetensors", "a9")]},
            ["--model-name-or-path  bert: model.safetensors a1000000  roberta: model.safetensors a9000000"],
        ),
        (
            {
                "--model-name-or-path": [
                    ("hub/models--org--name/snapshots/12ab/config.json", "c9"),
                    ("hub/models--org--name/snapshots/12ab/model.safetensors", "a9"),
                ]
            },
            ["--model-name-or-path  bert: config.json c0000000 and 1 more  org/name: config.json c9000000 and 1 more"],
        ),
    ],
)
def test_models_and_data_that_differ_are_named_with_their_hashes(inputs, rows, tmp_path, compared):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", inputs=inputs)
    lines = compared("a", "b")
    table = lines[4:-2] if rows else []
    assert ["  ".join(filter(None, (cell.strip() for cell in line.split("  ")))) for line in table] == [
        *["input or setting  a  b"] * bool(rows),
        *rows,
    ]
    assert any("input or setting" in line for line in lines) == bool(rows)


def test_hashes_of_text_are_shortened_and_devices_compared(tmp_path, compared):
    for name, digit, device in (("a", "1", "cpu"), ("b", "2", "NVIDIA H200")):
        write_run(tmp_path / name, settings={"training text": digit * 64, "--seed": 1}, device=device)
    lines = compared("a", "b")
    assert lines[5].split() == ["training", "text", "11111111", "22222222"]
    assert lines[6].split() == ["device", "cpu", "NVIDIA", "H200"]


def test_each_run_shows_the_metric_that_decides_for_it(tmp_path, compared, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    labels = []
    monkeypatch.setattr(report_plots, "draw", lambda path, size, *panels: labels.extend(labels_of(pyplot, panels)))
    scores = {"eval_accuracy": 0.9, "eval_f1": 0.4}
    write_run(tmp_path / "classes", entries=[{"step": 4, "loss": 0.5, **scores}])
    write_run(tmp_path / "entities", metric="f1", entries=[{"step": 6, "loss": 0.25, **scores}])
    lines = compared("classes", "entities")
    assert [line.split() for line in lines[:3]] == [
        ["run", "steps", "training", "loss", "metric", "best", "value", "at", "step"],
        ["classes", "4", "0.5", "accuracy", "0.9", "4"],
        ["entities", "6", "0.25", "f1", "0.4", "6"],
    ]
    assert lines[3] == "The runs have different metrics, accuracy, f1: compare only values of the same one."
    assert labels == ["training loss", "validation accuracy", "validation f1"]


def labels_of(pyplot, panels) -> list[str]:
    """Return the labels of panels, each of which must draw something that is seen."""
    figure, axes = pyplot.subplots(len(panels), squeeze=False)
    for paint, one in zip(panels, axes[:, 0], strict=True):
        paint(one)
        assert any(len(line.get_xdata()) > 1 or line.get_marker() == "o" for line in one.lines)
    labels = [one.get_ylabel() for one in axes[:, 0]]
    pyplot.close(figure)
    return labels


@pytest.mark.slow
def test_a_run_that_is_shorter_than_the_logging_steps_is_shown_whole(
    pretrained, files, tmp_path, compared, monkeypatch
):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    values = {"model_name_or_path": str(pretrained), "output_dir": str(tmp_path / "a"), "max_steps": 2}
    finetune(FinetuneSettings.of(**values, train_file=files["train_file"], **QUICK))
    drawn = []
    monkeypatch.setattr(
        report_plots,
        "draw",
        lambda path, size, *panels: drawn.append((labels_of(pyplot, panels), title_of(pyplot, panels))),
    )
    lines = compared("a")
    entry = json.loads((tmp_path / "a" / "metrics.jsonl").read_text())
    assert lines[1].split() == ["a", "2", f"{entry['loss']:.6g}"]
    assert drawn == [(["training loss", "learning rate"], "1 run")]


def title_of(pyplot, panels) -> str:
    figure, axes = pyplot.subplots()
    panels[0](axes)
    pyplot.close(figure)
    return axes.get_title()


def test_a_finished_run_without_entries_shows_the_loss_of_its_results(tmp_path, compared):
    write_run(tmp_path / "a", entries=[], results={"train_loss": 0.375, "best_step": 2})
    lines = compared("a")
    assert lines[1].split() == ["a", "2", "0.375"]
    assert lines[-1] == "no plot: there is neither a loss nor a metric yet"
    assert not (tmp_path / "compare.png").exists()


def test_a_run_that_is_not_finished_is_said_to_be(tmp_path, compared):
    write_run(tmp_path / "a", finished=False, metric="f1")
    write_run(tmp_path / "b", metric="f1")
    lines = compared("a", "b")
    assert lines[0].split() == ["run", "steps", "training", "loss", "best", "f1", "at", "step"]
    assert lines[1].split() == ["a", "4", "(unfinished)", "0.5", "0.75", "4"]
    assert lines[2].split() == ["b", "4", "0.5", "0.75", "4"]


@pytest.mark.parametrize("finished", [True, False])
def test_the_step_is_that_of_the_saved_model_for_which_the_loss_decides_between_equals(finished, tmp_path, compared):
    measured = [(2, 0.75, 0.6), (4, 0.75, 0.5), (6, 0.5, 0.1)]
    entries = [{"step": step, "loss": 0.5, "eval_accuracy": score, "eval_loss": loss} for step, score, loss in measured]
    write_run(tmp_path / "a", finished=finished, entries=entries, results={"best_step": 4})
    assert compared("a")[1].split()[-2:] == ["0.75", "4"]


def test_epochs_that_the_number_of_steps_overrides_are_not_compared(tmp_path, compared):
    write_run(tmp_path / "a", settings={"--max-steps": 5, "--num-train-epochs": 3.0})
    write_run(tmp_path / "b", settings={"--max-steps": 5, "--num-train-epochs": 2.0})
    write_run(tmp_path / "c", settings={"--max-steps": None, "--num-train-epochs": 2.0})
    assert not any("--" in line for line in compared("a", "b"))
    assert "--num-train-epochs null 2.0" in [" ".join(line.split()) for line in compared("a", "c")]


def test_a_run_that_halving_dropped_before_it_logged_is_said_to_be(tmp_path, capsys):
    write_run(tmp_path / "a", finished=False, entries=[])
    (tmp_path / "a" / "sweep_rungs.json").write_text("{}")
    assert main(["compare", str(tmp_path / "a")]) == 1
    assert "a has no metrics: successive halving dropped it before a step was logged" in capsys.readouterr().err
    (tmp_path / "a" / "checkpoints").mkdir()  # it is only paused
    assert main(["compare", str(tmp_path / "a")]) == 1
    assert "a has no metrics yet: wait" in capsys.readouterr().err


@pytest.mark.slow
def test_the_metric_of_a_run_that_was_stopped_is_the_one_that_decides(pretrained, tmp_path, compared):
    file = write_examples(tmp_path, "token-classification", 48, seed=0)
    changes = {"validation_file": str(file), "eval_steps": 1}
    with pytest.raises(RunStopped):
        finetune(task_settings("token-classification", pretrained, file, tmp_path / "a", **changes), stopped_at(2))
    lines = compared("a")
    assert lines[0].split()[4:6] == ["best", "f1"]
    assert "2 (unfinished)" in lines[1]


@pytest.mark.slow
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
