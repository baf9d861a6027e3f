"""A sweep runs every combination once and names the best run."""

import json
import statistics

import pytest
from sentiment import QUICK
from task_examples import write_examples

from bertfast.runtime.settings import settings_of
from bertfast.training.sweep import SweepSettings, sweep


def settings_for(pretrained, folder, **changes) -> SweepSettings:
    file = str(write_examples(folder, "sequence-classification", 48, seed=0))
    shared = {name: value for name, value in QUICK.items() if name in settings_of(SweepSettings)}
    values = shared | {"learning_rates": [1e-2, 1e-5], "batch_sizes": [16], "epochs": [1.0], "seeds": [1, 2]} | changes
    return SweepSettings.of(
        model_name_or_path=str(pretrained),
        train_file=file,
        validation_file=file,
        output_dir=str(folder / "out"),
        **values,
    )


def test_a_sweep_names_the_best_run_and_repeats_none(pretrained, tmp_path, capsys):
    settings = settings_for(pretrained, tmp_path)
    results = sweep(settings)
    assert results["metric"] == "accuracy"
    one, other = results["combinations"]
    assert one["mean"] == statistics.mean(one["scores"]) >= other["mean"]
    assert one["spread"] == pytest.approx(statistics.stdev(one["scores"]))
    folders = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert len(folders) == 4
    best = json.loads((tmp_path / "out" / results["best"] / "sweep_score.json").read_text())
    assert best["score"] == max(score for each in results["combinations"] for score in each["scores"])
    assert (tmp_path / "out" / "sweep.md").read_text().count("\n|") == 3
    times = [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")]
    assert sweep(settings) == results
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "--seeds requires at least one value"),
        ({"validation_file": None}, "a sweep requires --validation-file"),
    ],
)
def test_invalid_settings_are_refused(changes, message, pretrained, tmp_path):
    values = {"model_name_or_path": "m", "train_file": "a", "validation_file": "b", "output_dir": "c"} | changes
    with pytest.raises(ValueError, match=message):
        SweepSettings.of(**values)
