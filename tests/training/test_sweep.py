"""A sweep runs every combination once and names the best run."""

import json
import math
import re
import signal
import statistics

import pytest
import torch
from sentiment import QUICK
from task_examples import write_examples

from bertfast.runtime.output_folder import OriginError
from bertfast.runtime.settings import settings_of
from bertfast.runtime.signals import RunStopped
from bertfast.training import finetuning, optimizer
from bertfast.training.finetune_settings import FinetuneSettings
from bertfast.training.sweep import SweepSettings, _run_settings, sweep
from bertfast.training.sweep_plan import SweepPlan, shown_duration
from bertfast.training.sweep_results import Combination, Score, best_of, read_score, table, tie


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


def test_a_sweep_names_the_best_run_and_repeats_none(pretrained, tmp_path, caplog, capsys):
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
    assert "there is no checkpoint" not in caplog.text
    assert times == [path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")]


def test_runs_of_another_sweep_are_refused_or_replaced(pretrained, tmp_path, capsys):
    one = {"learning_rates": [1e-2], "seeds": [1]}
    settings = settings_for(pretrained, tmp_path, **one)
    sweep(settings)
    run = tmp_path / "out" / "rate-0.01-batch-16-epochs-1-seed-1"
    before = (run / "sweep_score.json").stat().st_mtime_ns
    sweep(settings.replace(seeds=[1, 2]))  # more combinations: finished runs are kept
    assert (run / "sweep_score.json").stat().st_mtime_ns == before
    with pytest.raises(OriginError, match=r"--weight-decay was 0\.01 and is 0\.5: .*--overwrite-output-dir"):
        sweep(settings.replace(weight_decay=0.5))
    write_examples(tmp_path, "sequence-classification", 40, seed=1)
    with pytest.raises(OriginError, match=r"--train-file was .* and is .*; --validation-file was"):
        sweep(settings)
    assert len(sweep(settings.replace(overwrite_output_dir=True))["combinations"]) == 1
    assert not (tmp_path / "out" / "rate-0.01-batch-16-epochs-1-seed-2").exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"metric": "accuracy"}'])
def test_a_run_with_a_damaged_score_is_repeated(content, pretrained, tmp_path, caplog):
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e-2], seeds=[1])
    results = sweep(settings)
    score = tmp_path / "out" / "rate-0.01-batch-16-epochs-1-seed-1" / "sweep_score.json"
    score.write_text(content)
    assert sweep(settings) == results
    assert f"{score} is damaged: the run is repeated" in caplog.text


def test_a_part_of_another_sweep_is_refused(pretrained, tmp_path, capsys):
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e-2], seeds=[1])
    sweep(settings)
    # As if the run were a copy, or its rate had the same first six digits.
    record = tmp_path / "out" / "rate-0.01-batch-16-epochs-1-seed-1" / "origin.json"
    record.write_text(record.read_text().replace('"--learning-rate": 0.01', '"--learning-rate": 0.010000001'))
    message = r"--learning-rate was 0\.010000001 and is 0\.01: .*--overwrite-output-dir"
    with pytest.raises(OriginError, match=message):
        sweep(settings)
    (record.parent / "sweep_score.json").unlink()  # as of a run that was interrupted
    capsys.readouterr()
    with pytest.raises(OriginError, match=message):
        sweep(settings.replace(learning_rates=[1e-3, 1e-2]))
    assert not [*(tmp_path / "out").glob("rate-0.001-*")]


def test_the_warm_up_of_every_run_is_checked_before_the_first(pretrained, tmp_path):
    settings = settings_for(pretrained, tmp_path, batch_sizes=[4, 16], epochs=[2.0, 1.0], warmup_steps=5)
    message = "--warmup-steps 5 is more than the 3 steps of the run with batch 16 and 1 epoch: lower it, or raise --ep"
    with pytest.raises(ValueError, match=message):
        sweep(settings)
    assert not (tmp_path / "out").exists()
    assert len(sweep(settings.replace(epochs=[2.0], learning_rates=[1e-5], seeds=[1]))["combinations"]) == 2


def test_an_interrupted_sweep_says_that_the_same_command_continues_it(pretrained, tmp_path):
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e-2], seeds=[1])
    with pytest.MonkeyPatch.context() as patch:
        train_step = finetuning.Finetuning.train_step

        def stop(self, rows):
            train_step(self, rows)
            signal.raise_signal(signal.SIGTERM)

        patch.setattr(finetuning.Finetuning, "train_step", stop)
        with pytest.raises(RunStopped, match=r"with a checkpoint: run the same command again to continue the sweep$"):
            sweep(settings)


def test_equal_scores_are_decided_by_the_loss_and_then_by_the_order_of_the_grid():
    scores = [Score("accuracy", 0.5, loss=loss) for loss in (0.7, 0.6, 0.8)]
    results = [*zip(scores, "abc", strict=True)]
    assert best_of(results) == ("b", "3 runs have the same accuracy, 0.5: the lower validation loss decides")
    assert best_of([*results, (Score("accuracy", 0.6, loss=2.0), "d")]) == ("d", "")
    assert best_of([(Score("accuracy", None, "diverged"), "a")]) == (None, "")
    equal = [(Score("accuracy", 0.5, loss=0.7), name) for name in "ab"]
    how = "the lower validation loss decides, and the order of the grid where that is equal, too"
    assert best_of(equal) == ("a", f"2 runs have the same accuracy, 0.5: {how}")
    without = [(Score("spearmanr", -0.25), name) for name in "ab"]
    assert best_of(without) == ("a", "2 runs have the same spearmanr, -0.25: the order of the grid decides")
    assert tie([(-0.5, -0.5)], [(-0.5, -0.5), (math.nan, -math.inf)], "loss", "runs").startswith("2 runs have the same")
    page = table("accuracy", *best_of(results), [Combination.of(1e-5, 16, 1.0, scores)])
    assert page.endswith(
        "The best run is in b (3 runs have the same accuracy, 0.5: the lower validation loss decides).\n"
    )


def test_combinations_with_the_same_score_are_sorted_by_their_loss(pretrained, tmp_path, capsys):
    """The learning rates are so small that predictions do not change."""
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e-12, 1e-7, 1e-11], seeds=[1])
    results = sweep(settings)
    rows = results["combinations"]
    assert len({row["mean"] for row in rows}) == 1
    assert [row["loss"] for row in rows] == sorted(row["loss"] for row in rows)
    assert "rate-1e-07-" in results["best"]
    assert "3 runs have the same accuracy" in capsys.readouterr().out


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


def diverging(monkeypatch, rates) -> list[float]:
    """Have the gradients of runs with these learning rates be NaN; return a list to which runs add their rates."""
    started: list[float] = []
    start, norm_of = finetuning.Finetuning.run, optimizer.get_total_norm

    def run(self, on_step):
        started.append(self.hyperparameters.learning_rate)
        return start(self, on_step)

    def norm(gradients):
        return torch.tensor(float("nan")) if started[-1] in rates else norm_of(gradients)

    monkeypatch.setattr(finetuning.Finetuning, "run", run)
    monkeypatch.setattr(optimizer, "get_total_norm", norm)
    return started


def test_a_combination_that_diverges_is_marked_and_the_sweep_goes_on(pretrained, tmp_path, monkeypatch, caplog, capsys):
    settings = settings_for(pretrained, tmp_path, learning_rates=[2.0, 1e-5], seeds=[1])
    started = diverging(monkeypatch, [2.0])
    results = sweep(settings)
    good, bad = results["combinations"]
    assert (good["learning_rate"], good["failed"], good["mean"]) == (1e-5, None, good["scores"][0])
    assert (bad["learning_rate"], bad["scores"], bad["mean"], bad["spread"]) == (2.0, [None], None, None)
    assert bad["failed"].startswith(
        "all 3 steps so far were skipped, from step 1 on: a gradient is not finite; no step"
    )
    assert results["best"].endswith("rate-1e-05-batch-16-epochs-1-seed-1")
    assert results == json.loads((tmp_path / "out" / "sweep.json").read_text())
    page = (tmp_path / "out" / "sweep.md").read_text()
    assert "| 2 | 16 | 1 | failed |  |" in page
    assert f"Failed: learning rate 2, batch 16, epochs 1: {bad['failed']}" in page
    assert "seed-1 failed, the sweep goes on: all 3 steps" in caplog.text
    assert sweep(settings) == results
    assert started == [2.0, 1e-5]  # neither run is repeated


def test_one_seed_that_diverges_fails_its_combination(pretrained, tmp_path, capsys):
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e38, 1e-5])
    results = sweep(settings)
    assert [row["failed"] is None for row in results["combinations"]] == [True, False]
    failed = results["combinations"][1]["failed"]
    assert re.fullmatch(r"after step \d, .* not finite on the validation data; lower --learning-rates", failed)
    one = Combination.of(1e-5, 16, 1.0, [Score("accuracy", 0.5), Score("accuracy", None, "diverged")])
    assert (one.scores, one.failed, math.isnan(one.mean)) == ([0.5, None], "diverged", True)


def test_a_sweep_of_which_all_runs_diverge_ends_with_an_error(pretrained, tmp_path, capsys):
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e38], seeds=[1])
    message = r"all 1 run failed, see .*sweep\.md: after step \d, .*; lower --learning-rates$"
    with pytest.raises(RunStopped, match=message):
        sweep(settings)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["best"] is None


def test_a_run_that_exhausts_the_memory_fails_and_is_repeated_the_next_time(pretrained, tmp_path, monkeypatch, capsys):
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e-5], batch_sizes=[8, 16], seeds=[1])
    start = finetuning.Finetuning.run

    def run(self, on_step):
        if self.hyperparameters.per_device_train_batch_size == 16:
            raise MemoryError
        return start(self, on_step)

    with monkeypatch.context() as patch:
        patch.setattr(finetuning.Finetuning, "run", run)
        assert sweep(settings)["combinations"][1]["failed"].startswith("not enough memory: use smaller --batch-sizes")
    assert [row["failed"] for row in sweep(settings)["combinations"]] == [None, None]


def test_an_interrupted_run_ends_the_sweep(pretrained, tmp_path, monkeypatch):
    def run(self, on_step):
        raise RunStopped("stopped after step 1 of 3", 130)

    monkeypatch.setattr(finetuning.Finetuning, "run", run)
    with pytest.raises(RunStopped, match="stopped after step 1 of 3"):
        sweep(settings_for(pretrained, tmp_path))


def test_rates_that_differ_in_the_eighth_digit_have_folders_of_their_own(tmp_path):
    settings = settings_for("m", tmp_path, learning_rates=[1e-5, 1.0000001e-5])
    folders = [_run_settings(settings, rate, 16, 1.0, 1).output_dir for rate in settings.grid.learning_rates]
    assert [path.rpartition("/")[2].partition("-batch")[0] for path in folders] == ["rate-1e-05", "rate-1.0000001e-05"]


@pytest.mark.parametrize("score", ["NaN", "Infinity", '"x"', "null"])
def test_a_score_that_is_no_finite_number_is_damage(score, tmp_path, caplog):
    path = tmp_path / "sweep_score.json"
    path.write_text(f'{{"metric": "accuracy", "score": {score}}}')
    assert read_score(path) is None
    assert "sweep_score.json is damaged: the run is repeated" in caplog.text
    path.write_text('{"metric": "accuracy", "score": 0.5}')
    assert read_score(path) == Score("accuracy", 0.5)
    path.write_text('{"metric": "accuracy", "score": 0.5, "failed": null, "loss": 0.7}')
    assert read_score(path) == Score("accuracy", 0.5, loss=0.7)


def test_feature_layers_are_checked_with_the_settings(tmp_path):
    with pytest.raises(ValueError, match=r"--feature-layers must be one of embeddings, .*, got 'x'"):
        settings_for("m", tmp_path, strategy="feature-based", feature_layers="x")


def test_the_plan_says_which_run_comes_next_and_the_time_left(pretrained, tmp_path, caplog, capsys):
    caplog.set_level("INFO", "bertfast")
    settings = settings_for(pretrained, tmp_path, learning_rates=[1e-2], seeds=[1])
    sweep(settings)
    assert "the sweep has 1 run\n" in caplog.text
    assert "run 1 of 1: learning rate 0.01, batch 16, epochs 1, seed 1\n" in caplog.text
    caplog.clear()
    sweep(settings.replace(learning_rates=[1e-2, 1e-3], seeds=[1, 2]))
    assert "the sweep has 4 runs, 1 of them finished\n" in caplog.text
    said = [line for line in caplog.messages if line.startswith("run ")]
    assert [line.split(": ")[0] for line in said] == ["run 2 of 4", "run 3 of 4", "run 4 of 4"]
    assert ["left" in line for line in said] == [False, True, True]


def test_the_time_left_is_proportional_to_the_epochs(caplog):
    runs = [
        FinetuneSettings.of(model_name_or_path="m", train_file="a", output_dir=str(epochs), num_train_epochs=epochs)
        for epochs in (1.0, 2.0, 4.0)
    ]
    plan = SweepPlan(runs, 3)
    assert math.isnan(plan.seconds_left)
    plan.end(runs[0], 60.0)
    assert plan.seconds_left == 360
    plan.end(runs[1], 240.0)
    assert plan.seconds_left == 400
    assert [shown_duration(seconds) for seconds in (4.4, 59, 400, 3600, 3900)] == [
        "4 s",
        "59 s",
        "7 min",
        "1 h 00 min",
        "1 h 05 min",
    ]
