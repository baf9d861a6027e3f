"""Throughput of several processes on one machine."""

from __future__ import annotations

import statistics
from typing import Any

from bench.page.rows import Result
from bench.page.text import table


def scaling_text(result: Result) -> str:
    """Return the table of a result of `bench.end_to_end.scaling`, "" for other results."""
    if result.name != "scaling":
        return ""
    values = result.values
    runs = values["runs"]
    title = (
        f"Pre-training of `{values['preset']}` in {values['precision']} by processes of one thread on "
        f"{values['cores']} cores, {values['tokens_per_process']:,} tokens of each process per step, gloo. The "
        "parallel efficiency is the throughput divided by that of one process and by the number of processes, or of "
        f"cores if it is lower; medians and ranges of {len(runs[0]['tokens_per_second'])} rounds:"
    )
    columns = ["processes", "parameters", "tokens/s", "range", "parallel efficiency", "range"]
    return f"{title}\n\n{table(columns, map(_cells, runs))}\n"


def _cells(run: dict[str, Any]) -> list[str]:
    parameters = "sharded" if run["sharded"] else "replicated"
    rates, shares = run["tokens_per_second"], run["parallel_efficiency"]
    return [
        str(run["processes"]),
        parameters if run["processes"] > 1 else "",
        f"{statistics.median(rates):,.0f}",
        f"{min(rates):,.0f} to {max(rates):,.0f}",
        f"{statistics.median(shares):.0%}",
        f"{min(shares):.0%} to {max(shares):.0%}",
    ]
