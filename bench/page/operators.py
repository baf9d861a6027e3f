"""The operators of a processor, each compared with the fastest alternative of its case."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from bench.figures import OPERATOR_NAMES
from bench.page.rows import Result, is_clearly_faster
from bench.page.text import duration, table
from bertfast.runtime.settings import counted


@dataclass(frozen=True)
class Comparison:
    """An operator in one direction, as pytest-benchmark recorded both runs.

    Attributes:
        bertfast: bertfast's run.
        alternative: The fastest other run of the same case.
    """

    bertfast: dict[str, Any]
    alternative: dict[str, Any]

    @property
    def cells(self) -> list[str]:
        """Operator, case, direction, both times, ratio, and the share of the lower bound in bertfast's time."""
        own, other = self.bertfast, self.alternative
        return [
            own["operation"],
            own["case"],
            own["direction"],
            duration(own["median"]),
            f"{self.alternative_name} {duration(other['median'])}",
            f"{other['median'] / own['median']:.2f} x",
            f"{own['roofline_efficiency']:.0%}",
        ]

    @property
    def alternative_name(self) -> str:
        """Name of the alternative on the page."""
        name: str = self.alternative["implementation"]
        return OPERATOR_NAMES.get(name, name)

    @property
    def is_behind(self) -> bool:
        """Whether the alternative is faster by more than the spread."""
        own, other = self.bertfast, self.alternative
        return is_clearly_faster((other["p20_s"], other["p80_s"]), (own["p20_s"], own["p80_s"]))


def comparisons(result: Result) -> Iterator[Comparison]:
    """Yield the operators of a result file that have an alternative; none if it is another kind of file."""
    if result.name != "cpu_operators":
        return
    runs = [run["extra_info"] | run["stats"] for run in result.values["benchmarks"]]
    for _, group in groupby(sorted(runs, key=_case), key=_case):
        found = {run["implementation"]: run for run in group}
        own = found.pop("bertfast", None)
        others = [run for name, run in found.items() if not name.startswith("bertfast")]
        if own is not None and others:
            yield Comparison(own, min(others, key=lambda run: float(run["median"])))


def operators_text(result: Result) -> str:
    """Return the table of the operators of a result file, "" if it has none."""
    rows = [each.cells for each in comparisons(result)]
    if not rows:
        return ""
    columns = ["operator", "case", "pass", "bertfast", "fastest alternative", "alternative / bertfast", "bound / time"]
    threads = counted(result.origin["threads"], "thread")
    return (
        f"Operators, {threads} (`bench/results/{result.file}`). Attention has 12 heads; "
        '"32x128" is 32 sequences of 128 tokens, "64-ragged" 64 of different lengths, "p0.1" has dropout; without '
        '"fp32" the dtype is bf16. Alternatives on padded batches also compute the padding.\n\n'
        f"{table(columns, rows)}\n"
    )


def _case(run: dict[str, Any]) -> tuple[str, str, str]:
    return run["operation"], run["case"], run["direction"]
