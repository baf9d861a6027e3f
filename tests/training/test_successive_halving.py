"""Successive halving: the better half of the runs goes on, with the results that they would have had anyway."""

import json
import math
import signal

import pytest
from sentiment import QUICK
from task_examples import write_examples

from bertfast.runtime.signals import RunStopped
from bertfast.training.finetuning import Finetuning
from bertfast.training.successive_halving import better_half, fractions, recorded_score
from bertfast.training.sweep import SweepSettings, sweep

RATES = [1e-6, 1e-2, 1e-5, 3e-3]


def settings_for(pretrained, folder, **changes) -> SweepSettings:
    """Return a sweep of four learning rates, of runs of 24 steps."""
    file = str(write_examples(folder, "sequence-classification", 48, seed=0))
    values = {"model_name_or_path": str(pretrained), "train_file": file, "validation_file": file}
    grid = {"learning_rates": RATES, "batch_sizes": [16], "epochs": [8.0], "seeds": [1], "successive_halving": True}
    shared = {name: QUICK[name] for name in ("device", "precision")}
    return SweepSettings.of(**values | shared | grid | {"output_dir": str(folder / "out")} | changes)


@pytest.fixture
def steps(monkeypatch) -> list[float]:
    """Return a list to which each step adds the learning rate of its run."""
    done: list[float] = []
    train_step = Finetuning.train_step

    def counted(self, rows):
        done.append(self.hyperparameters.learning_rate)
        train_step(self, rows)

    monkeypatch.setattr(Finetuning, "train_step", counted)
    return done


@pytest.mark.parametrize(
    ("combinations", "expected"), [(1, []), (2, [0.5]), (3, [0.25, 0.5]), (4, [0.25, 0.5]), (18, [0.125, 0.25, 0.5])]
)
def test_there_are_at_most_three_halvings(combinations, expected):
    assert fractions(combinations) == expected


def test_failures_are_never_in_the_better_half():
    assert better_half([("a", (1.0, 0.0)), ("b", (math.nan, 0.0)), ("c", (3.0, 0.0)), ("d", (2.0, 0.0))]) == ["c", "d"]
    assert better_half([("a", (1.0, 0.0)), ("b", (2.0, 0.0)), ("c", (2.0, 0.0))]) == ["b", "c"]
    assert better_half([("a", (math.nan, 0.0)), ("b", (math.nan, 0.0))]) == []


def test_ties_are_decided_by_the_loss_and_then_by_the_order():
    assert better_half([("a", (1.0, -0.5)), ("b", (1.0, -0.4))]) == ["b"]
    assert better_half([("a", (1.0, -0.5)), ("b", (1.0, -0.5))]) == ["a"]
    assert better_half([("a", (1.0, -9.0)), ("b", (0.5, -0.1))]) == ["a"]


@pytest.mark.slow
def test_of_combinations_with_the_same_score_those_with_the_lower_loss_go_on(pretrained, tmp_path, caplog, capsys):
    """The learning rates are so small that predictions do not change."""
    caplog.set_level("INFO", "bertfast")
    rates = [1e-12, 1e-11, 1e-8, 1e-7]
    results = sweep(settings_for(pretrained, tmp_path, learning_rates=rates, epochs=[2.0]))
    assert "rate-1e-07-" in results["best"]
    assert [row["learning_rate"] for row in results["combinations"]][:2] == [1e-7, 1e-8]
    assert "4 combinations have the same accuracy, " in caplog.text
    assert ": the lower validation loss decides" in caplog.text


@pytest.mark.slow
def test_the_better_half_goes_on_and_ends_as_in_a_complete_sweep(pretrained, tmp_path, steps, caplog, capsys):
    caplog.set_level("INFO", "bertfast")
    settings = settings_for(pretrained, tmp_path)
    results = sweep(settings)
    rows = {row["learning_rate"]: row for row in results["combinations"]}
    assert [row["trained"] for row in results["combinations"]] == [1.0, 0.5, 0.25, 0.25]
    assert {rate: steps.count(rate) for rate in RATES} == {rate: 24 * rows[rate]["trained"] for rate in RATES}
    assert {rate for rate in RATES if rows[rate]["trained"] == 0.25} == {1e-6, 1e-5}
    (best,) = (row for row in rows.values() if row["trained"] == 1)
    assert f"rate-{best['learning_rate']:g}-" in results["best"]
    assert "the sweep has 4 runs, up to 25 % of their steps" in caplog.text
    assert "the sweep goes on with 2 runs, up to 50 % of their steps" in caplog.text
    assert "the sweep goes on with 1 run\n" in caplog.text
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert "| trained |\n|---|---|---|---|---|---|\n" in page
    assert page.count("| 25 % |") == 2
    assert not [*(tmp_path / "out").glob("*/checkpoints/step-*")]
    steps.clear()
    assert sweep(settings) == results
    assert steps == []

    complete = settings.replace(output_dir=str(tmp_path / "complete"), successive_halving=False)
    every = sweep(complete)
    (same,) = (row for row in every["combinations"] if row["learning_rate"] == best["learning_rate"])
    assert same == best
    run = results["best"].rpartition("/")[2]
    weights = [(tmp_path / name / run / "model.safetensors").read_bytes() for name in ("out", "complete")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on_where_it_was(pretrained, tmp_path, steps, monkeypatch, capsys):
    expected = sweep(settings_for(pretrained, tmp_path))
    total = len(steps)
    cut = settings_for(pretrained, tmp_path, output_dir=str(tmp_path / "cut"))
    steps.clear()
    train_step = Finetuning.train_step

    def stop(self, rows):
        train_step(self, rows)
        if len(steps) in (3, 6, 21):
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Finetuning, "train_step", stop)
    for _ in range(3):
        with pytest.raises(RunStopped, match=r"stopped after step \d+ of 24"):
            sweep(cut)
    found = sweep(cut)
    assert found["combinations"] == expected["combinations"]
    assert len(steps) == total


@pytest.mark.slow
def test_runs_that_diverge_are_dropped(pretrained, tmp_path, monkeypatch, capsys):
    results = sweep(settings_for(pretrained, tmp_path, learning_rates=[1e38, 3e-3, 1e37], epochs=[4.0]))
    good, *bad = results["combinations"]
    assert (good["learning_rate"], good["trained"], good["failed"]) == (3e-3, 1.0, None)
    assert all("lower --learning-rates" in row["failed"] for row in bad)
    with pytest.raises(RunStopped, match="all 2 runs failed"):
        sweep(settings_for(pretrained, tmp_path, output_dir=str(tmp_path / "none"), learning_rates=[1e38, 1e37]))


def test_a_damaged_record_is_none(tmp_path, caplog):
    path = tmp_path / "sweep_rungs.json"
    assert recorded_score(tmp_path, 0.5) is None
    path.write_text(json.dumps({"metric": "accuracy", "0.5": {"score": 0.75, "loss": 0.5}, "1": {"score": 0.5}}))
    assert recorded_score(tmp_path, 0.5) == ("accuracy", 0.75, 0.5)
    assert recorded_score(tmp_path, 1) == ("accuracy", 0.5, None)
    for metric, worst in (("spearmanr", -math.inf), ("loss", math.inf)):  # which was undefined
        (tmp_path / "sweep_rungs.json").write_text(json.dumps({"metric": metric, "0.5": {"score": None, "loss": 0.5}}))
        assert recorded_score(tmp_path, 0.5) == (metric, worst, 0.5)
    path.write_text(json.dumps({"metric": "accuracy", "0.5": {"score": 0.75, "loss": 0.5}}))
    assert recorded_score(tmp_path, 0.25) is None
    damages = ["{", '{"0.5": {"score": 0.5}}']
    damages += [
        f'{{"metric": "accuracy", "0.5": {value}}}'
        for value in ("0.5", '{"score": NaN}', '{"score": 1.0, "loss": "x"}')
    ]
    for damaged in damages:
        path.write_text(damaged)
        assert recorded_score(tmp_path, 0.5) is None
    assert "sweep_rungs.json is damaged: the run is repeated" in caplog.text
