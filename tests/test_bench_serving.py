"""The benchmark of examples/serve.py: its load, its arithmetic and its rows in docs/BENCHMARKS.md."""

import gzip
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bench.end_to_end import load, serving
from bench.page.document import leaders, machine_section
from bench.page.rows import Result, rows_of
from bench.page.serving import serving_text

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [(100, 0.5, 50), (100, 0.99, 99), (100, 1, 100), (101, 0.99, 100), (10, 0.99, 10), (1, 0.5, 1), (100, 0.07, 7)],
)
def test_a_percentile_is_the_smallest_sample_that_enough_do_not_exceed(count, share, expected):
    samples = np.random.default_rng(0).permutation(np.arange(1, count + 1)).tolist()
    assert load.percentile(samples, share) == expected


def test_arrivals_are_those_of_a_poisson_process_and_the_same_for_all_engines():
    arrivals = load.poisson_arrivals(50, 20_000, [1, 0])
    assert arrivals == load.poisson_arrivals(50, 20_000, [1, 0]) != load.poisson_arrivals(50, 20_000, [2, 0])
    gaps = np.diff([0, *arrivals])
    assert gaps.min() > 0
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.03)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.03)  # of exponential gaps it is their mean
    assert np.bincount(np.int64(arrivals)).var() == pytest.approx(
        50, rel=0.2
    )  # requests in a second: as many as the mean


def test_rates_are_shares_of_the_slowest_engine():
    assert serving.rates_of([1234.0, 456.0, 900.0]) == [140, 270, 410]  # 0.3, 0.6 and 0.9 of 456


@pytest.fixture
def running():
    """Return a function that starts the server of an engine, and gives its port."""
    pytest.importorskip("starlette", reason="the extra `serve`")
    pytest.importorskip("uvicorn", reason="the extra `serve`")
    sys.path.append(str(ROOT / "examples"))
    serve, runs = importlib.import_module("serve"), []

    def start(engine, **limits):
        application = serve.application(
            lambda texts: [[7] * len(text) for text in texts], engine, serve.Limits(**limits)
        )
        runs.append(serve.running(application))
        return int(runs[-1].__enter__().rpartition(":")[2])

    yield start
    for run in runs:
        run.__exit__(None, None, None)


def test_requests_are_sent_at_their_times_although_earlier_ones_wait(running):
    def slow(texts):
        time.sleep(0.5)
        return np.zeros((len(texts), 2))

    port = running(slow, tokens_per_batch=1)  # one text at a time: the last of three waits for 1.5 s
    answers = load.send_at(port, "/embed", [0.0, 0.01, 0.02], [serving.body_of("a")] * 3)
    assert all(latency > 0.48 * number for number, latency in enumerate(answers.latencies, 1))
    assert answers.seconds >= 1.5
    assert max(answers.late) < 0.4


def test_as_many_requests_are_under_way_as_should_be(running):
    sizes = []

    def engine(texts):
        sizes.append(len(texts))
        time.sleep(0.2)
        return np.zeros((len(texts), 2))

    seconds = load.send_all(running(engine), "/embed", [serving.body_of("a")] * 12, at_once=4)
    assert sum(sizes) == 12
    assert max(sizes) <= 4
    assert seconds >= 0.6


def test_a_refused_request_ends_the_measurement(running):
    port = running(lambda texts: np.zeros((len(texts), 2)), tokens_per_text=3)
    with pytest.raises(RuntimeError, match=r"the server refused .*texts\[0\] has 4 tokens: a text has 1 to 3"):
        load.send_at(port, "/embed", [0.0, 0.0], [serving.body_of("abc"), serving.body_of("abcd")])


def test_each_engine_gets_the_budget_with_which_it_is_fastest(monkeypatch):
    seconds, budgets = {1: 4.0, 256: 1.0, 4096: 2.0}, []
    server = SimpleNamespace(port=0, set_budget=budgets.append)
    monkeypatch.setattr(serving, "send_all", lambda *_: seconds[budgets[-1]])
    assert serving.best_budget(server, ["a"] * 1000) == (256, serving.BURST)
    assert budgets == list(serving.BUDGETS)


def test_a_padded_engine_averages_real_tokens_only():
    def predict(inputs):
        ids = inputs["input_ids"]
        assert ids.tolist() == [[3, 4], [1, 0]]
        assert inputs["token_type_ids"].tolist() == [[0, 0], [0, 0]]
        return torch.stack([ids.float(), torch.ones_like(ids) + 5 * (ids == 0)], -1)  # padding would change the mean

    vectors = serving.with_padding(predict)([[3, 4], [1]])
    np.testing.assert_allclose(vectors, [[3.5 / 3.5 * 0.961524, 0.274721], [0.707107, 0.707107]], atol=1e-5)


def test_python_threads_share_all_sentences():
    done = []

    def engine(texts):
        time.sleep(0.02)
        done.extend(texts)

    texts = [[n] for n in range(20)]
    one = serving.seconds_in_threads(engine, texts, 1)
    four = serving.seconds_in_threads(engine, texts, 4)
    assert sorted(done) == sorted(texts * 2)
    assert one >= 20 * 0.02
    assert 5 * 0.02 <= four < one
    with pytest.raises(ZeroDivisionError):  # of a thread
        serving.seconds_in_threads(lambda texts: 1 / 0, texts, 2)


def loads(*p50, sentences=1.0):
    return [{"p50_s": x, "p99_s": 3 * x, "sentences_per_batch": sentences} for x in p50]


RESULT = Result(
    "machine/serving.json",
    {
        "origin": {"threads": 2, "date": "", "commit": "", "python": "", "versions": {}},
        "model": "MiniLM",
        "precisions": serving.ENGINES,
        "errors": {"OpenVINO": {"relative": 1e-6, "cosine": 1.0}},
        "not_run": {"OpenVINO, bf16": "this processor has no bf16 instructions"},
        "tokens_per_batch": {"bertfast": 4096, "OpenVINO": 1, "bertfast, int8": 256},
        "python_threads": {
            "sentences": 128,
            "threads": 2,
            "seconds": {
                "bertfast": {"one": [2.0, 2.0, 9.0], "all": [1.0, 1.6, 5.0]},
                "bertfast, int8": {"one": [1.0], "all": [0.5]},
            },
        },
        "seconds": 2.5,
        "burst": {
            "sentences": 100,
            "at_once": 32,
            "seconds": {"bertfast": [0.5, 0.4, 0.6], "OpenVINO": [1.0, 1.0, 2.0], "bertfast, int8": [0.2, 0.2, 0.2]},
        },
        "loads": {
            "30": {
                "bertfast": loads(0.004, 0.005, 0.009, sentences=1.5),
                "OpenVINO": loads(0.003, 0.004, 0.005),
                "bertfast, int8": loads(0.002, 0.002, 0.003),
            }
        },
    },
)


def test_the_page_has_the_latencies_and_who_is_ahead():
    rows = rows_of(RESULT)
    found = {(row.workload.removeprefix("serving, MiniLM, "), row.system, row.precision): row.seconds for row in rows}
    assert found[("30 requests/s, p50 of the latency", "bertfast", "fp32")] == 0.005
    assert found[("30 requests/s, p99 of the latency", "OpenVINO", "fp32")] == pytest.approx(0.012)
    assert found[("100 sentences, 32 at a time", "bertfast", "int8")] == 0.2
    assert len(rows) == 9
    group = [row for row in rows if "p50" in row.workload]
    assert [(row.system, reference.system) for row, reference in leaders(group)] == [("OpenVINO", "bertfast")]
    assert leaders([row for row in rows if "at a time" in row.workload]) == []


def test_the_section_of_the_page_has_budgets_and_throughputs():
    text = serving_text(RESULT)
    assert "| **bertfast** | fp32 | 30 | 5.00 ms | 15.0 ms | 1.5 | 4,096 | 200 |" in text
    assert "| OpenVINO | fp32 | 30 | 4.00 ms | 12.0 ms | 1.0 | 1 | 100 |" in text
    assert "| **bertfast** | int8 | 30 | 2.00 ms | 6.00 ms | 1.0 | 256 | 500 |" in text
    assert "2 Python threads that share one model" in text
    assert text.endswith("relative to one such thread: 1.80 x in fp32, 2.00 x in int8.\n")
    assert text in machine_section("processor", [RESULT], ROOT)
    assert serving_text(Result("embed.json", {})) == ""


@pytest.mark.slow
def test_the_program_measures_all_engines_that_run(tmp_path):
    for package in ("starlette", "uvicorn", "onnxscript"):
        pytest.importorskip(package)
    sys.path.append(str(ROOT / "examples"))
    import bertfast

    folder = importlib.import_module("tiny_model").save_tiny_model(tmp_path / "model", bertfast.BertModel)
    (tmp_path / "glue" / "SST-2").mkdir(parents=True)
    rows = ["sentence\tlabel", *(f"A short text. The second reading {'agreed ' * (n % 7)}\t1" for n in range(400))]
    (tmp_path / "glue" / "SST-2" / "train.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    options = ["--repeats=2", "--seconds=0.2", f"--results={tmp_path}"]
    command = [sys.executable, "-m", "bench.end_to_end.serving", folder, str(tmp_path), *options]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "serving.json").read_text())
    measured = serving.ENGINES.keys() - result["not_run"].keys()
    assert {"bertfast", "bertfast, int8"} <= measured
    assert result["errors"].keys() == result["tokens_per_batch"].keys() == measured
    assert len(result["loads"]) == len(serving.SHARES)
    assert result["python_threads"]["seconds"].keys() == measured & set(serving.SHARED_BY_THREADS)
    serving_text(Result("serving.json", result))
    for engines in result["loads"].values():
        assert engines.keys() == measured
        assert all(0 < one["p50_s"] <= one["p99_s"] for rounds in engines.values() for one in rounds)
        assert all(len(rounds) == 2 for rounds in engines.values())
    assert not any(str(tmp_path) in path.read_text() for path in tmp_path.glob("*.json"))
    assert len(rows_of(Result("serving.json", result))) == (2 * len(serving.SHARES) + 1) * len(measured)
