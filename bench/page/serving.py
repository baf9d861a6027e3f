"""The HTTP server of examples/serve.py under load, with bertfast and with OpenVINO."""

from __future__ import annotations

import statistics

from bench.page.rows import Result
from bench.page.text import duration, table


def serving_text(result: Result) -> str:
    """Return what the rows of a server were measured with, and a table of its loads, "" for other results."""
    if result.name != "serving":
        return ""
    values = result.values
    burst = values["burst"]
    text = (
        "### Serving\n\n"
        f"Requests of one sentence of SST-2 to [examples/serve.py](../examples/serve.py), with {values['model']} and "
        f"each engine in a process of its own (`bench/results/{result.file}`, measured by "
        "`bench/end_to_end/serving.py`). Each engine gets the largest number of tokens per batch, of those that the "
        "program names, with which it answers most sentences per second. OpenVINO's batches are padded. "
        "Requests are sent at random times (Poisson), the same for all engines, "
        f"for {values['seconds']:g} seconds per round, by a process on the same cores. A latency ends with the whole "
        f"answer, as JSON. The last column is the throughput with {burst['at_once']} requests under way.\n\n"
    )
    columns = ["system", "precision", "requests/s", "p50", "p99", "sentences per batch", "largest batch, tokens"]
    rows = []
    for rate, engines in values["loads"].items():
        for name, rounds in engines.items():
            precision = values["precisions"][name]
            system = name.removesuffix(f", {precision}")
            cells = [f"**{system}**" if system == "bertfast" else system, precision, rate]
            p50, p99, joined = (
                statistics.median(load[key] for load in rounds) for key in ("p50_s", "p99_s", "sentences_per_batch")
            )
            cells += [duration(p50), duration(p99), f"{joined:.1f}"]
            throughput = burst["sentences"] / statistics.median(burst["seconds"][name])
            rows.append([*cells, f"{values['tokens_per_batch'][name]:,}", f"{throughput:.0f}"])
    return f"{text}{table([*columns, 'most sentences/s'], rows)}\n\n{threads_text(result)}"


def threads_text(result: Result) -> str:
    """Return the throughput of Python threads that share a model, relative to a single thread."""
    measured = result.values["python_threads"]
    ratios = []
    for name, seconds in measured["seconds"].items():
        by_round = [one / every for one, every in zip(seconds["one"], seconds["all"], strict=True)]
        ratios.append(f"{statistics.median(by_round):.2f} x in {result.values['precisions'][name]}")
    return (
        f"Throughput of {measured['threads']} Python threads that share one model of bertfast, each with one thread of "
        f"PyTorch, that embed {measured['sentences']} sentences one at a time, relative to one such thread: "
        f"{', '.join(ratios)}.\n"
    )
