"""`make bench-compare`: what it says about two commits."""

import sys

import numpy as np
import pytest

from bench import compare, compare_cases, installed_commits

ROOT = compare.ROOT


def noise(scale: float, rounds: int = 10) -> np.ndarray:
    return np.random.default_rng(1).normal(1, scale, rounds)


def commit(name: str, **options) -> installed_commits.Commit:
    return installed_commits.Commit(name, "0" * 40, ROOT, **options)


def compared(before, after, old=None, new=None) -> dict:
    """Return the result of rounds with one pair of calls each."""
    rounds = [compare.Round.of_pairs([pair]) for pair in zip(before, after, strict=True)]
    return compare.compare("case", old or commit("old"), new or commit("new"), rounds)


def test_a_difference_is_reported_only_if_it_exceeds_the_noise():
    before = list(noise(0.01))
    for factor, start in ((1.0, "no difference"), (1.2, "slower by 20.0%"), (0.8, "faster by 20.0%")):
        after = [factor * seconds for seconds in reversed(before)]
        row = compared(before, after)
        assert row["verdict"].startswith(start)
        assert row["low"] <= row["ratio"] <= row["high"]
    # Drift that affects both processes of a round cancels out.
    drift = np.linspace(1, 3, 10)
    assert compared(drift, 1.05 * drift * noise(0.005))["verdict"].startswith("slower by ")


def test_a_round_is_the_median_over_pairs_of_calls():
    drift = np.linspace(1, 3, 7)
    pairs = [(seconds, 1.1 * seconds) for seconds in drift] + [(1.0, 50.0)]
    found = compare.Round.of_pairs(pairs)
    assert found.ratio == pytest.approx(1.1)
    assert found.base_s == pytest.approx(np.median([*drift, 1.0]))


def test_intervals_of_equal_commits_contain_1():
    generator = np.random.default_rng(0)
    intervals = [compare.ratio_interval(list(generator.lognormal(0, 0.02, 10))) for _ in range(300)]
    assert sum(low <= 1 <= high for _, low, high in intervals) >= 294
    assert compare.ratio_interval([1.0, 2.0] * 4)[1:] == pytest.approx((1, 2))


def test_a_case_that_a_commit_lacks_and_outputs_that_differ_are_named():
    seconds = [1.0] * 8
    lacks = commit("old", reasons={"case": "AttributeError: no patch"})
    verdict = compared([], [], old=lacks)["verdict"]
    assert verdict == "not compared: old lacks it or fails (AttributeError: no patch)"
    old, new = (commit(name, values={"case": value}) for name, value in (("old", 0.5), ("new", 0.6)))
    assert "THE OUTPUTS DIFFER: 0.5, 0.6" in compared(seconds, seconds, old, new)["verdict"]
    assert "7 complete rounds" in compared(seconds[:7], seconds[:7])["verdict"]


def test_unknown_commits_and_too_few_rounds_are_refused(monkeypatch):
    with pytest.raises(SystemExit, match="there is no commit 'nowhere'"):
        installed_commits.resolve("nowhere")
    monkeypatch.setattr(sys, "argv", ["compare", "HEAD", "--rounds", "3"])
    with pytest.raises(SystemExit):
        compare.parse_arguments()


def test_the_same_commit_is_installed_once(tmp_path, monkeypatch):
    ran = []

    def run_setup(each, step):
        ran.append(step)
        (each.folder / "bertfast").mkdir()
        (each.folder / "bertfast" / installed_commits.LIBRARY[0]).write_text("library")

    monkeypatch.setattr(installed_commits, "_run_setup", run_setup)
    monkeypatch.setattr(installed_commits, "same_native_sources", lambda *refs: True)
    monkeypatch.setattr(installed_commits, "ROOT", tmp_path)
    both = {name: installed_commits.Commit("HEAD", "0" * 40, tmp_path / "installed") for name in ("base", "head")}
    for _ in range(2):
        installed_commits.install(both, rebuild=False)
    assert ran == ["build"]


def test_an_interruption_while_installing_ends_with_one_line(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "install", interrupted)
    monkeypatch.setattr(sys, "argv", ["compare", "HEAD", "--head", "HEAD~0", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="interrupted while installing: nothing was measured"):
        compare.main()


def test_both_runs_of_a_command_count_if_the_commits_are_the_same(monkeypatch, tmp_path):
    seconds = iter([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(compare, "_run_command", lambda *_: next(seconds))
    rounds = [compare.take_turns(commit("a"), commit("a"), ["import"], 0, tmp_path, first) for first in (0, 1)]
    assert [(found["import"].base_s, found["import"].head_s) for found in rounds] == [(1.0, 2.0), (4.0, 3.0)]


@pytest.mark.slow
def test_processes_take_turns_and_say_what_their_package_lacks(tmp_path, monkeypatch):
    assert set(compare_cases.CASES) == set(compare.IN_PROCESS)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "bertfast").mkdir()
    (tmp_path / "bertfast" / "__init__.py").write_text("from transformers import BertForSequenceClassification\n")
    (tmp_path / "bertfast" / "__main__.py").write_text("raise SystemExit('there is no command')\n")
    both = [installed_commits.Commit(name, name, tmp_path) for name in ("old", "new")]
    cases = ["patched model", "fine-tuning step", "bertfast --help"]
    found = compare.take_turns(*both, cases, 0, tmp_path, 0)
    assert [*found] == ["fine-tuning step"]
    assert found["fine-tuning step"].base_s > 0
    assert 0.4 < both[0].values["fine-tuning step"] == both[1].values["fine-tuning step"] < 1  # the loss of two labels
    for each in both:
        assert each.reasons["patched model"] == "AttributeError: module 'bertfast' has no attribute 'patch'"
        assert each.reasons["bertfast --help"] == "there is no command"


def test_another_package_than_the_commits_is_not_measured(tmp_path):
    elsewhere = installed_commits.Commit("old", "old", tmp_path)
    with (
        compare.Process(elsewhere, ["sentence of 8 tokens"]) as process,
        pytest.raises(SystemExit, match="the commit old was not measured, but"),
    ):
        process.prepare("sentence of 8 tokens")
