"""fp32 GEMMs by library."""

from __future__ import annotations

import statistics

from bench.end_to_end.inference import config_of
from bench.gemm_libraries import MODELS
from bench.page.rows import Result
from bench.page.text import table


def gemm_libraries_text(result: Result) -> str:
    """Return a table of `bench.gemm_libraries` by depth of the sums, "" for results of other programs."""
    if result.name != "gemm_libraries":
        return ""
    widths = sorted({config_of(name).hidden_size for name in MODELS})
    groups: dict[str, list[tuple[float, float]]] = {}
    for each in sorted(result.values["gemms"], key=lambda each: each["shape"][1]):
        depth = each["shape"][1]
        title = next((f"at most {width}" for width in widths if depth <= width), f"more than {widths[-1]}")
        groups.setdefault(title, []).append((each["mkl_gflops"], each["onednn_gflops"]))
    rows = [
        [title, str(len(rates)), *map(_range, zip(*rates, strict=True)), _ratios(rates)]
        for title, rates in groups.items()
    ]
    return (
        "### Libraries of fp32 GEMMs\n\nGFLOP/s of the GEMMs of a layer of BERT-base and of MiniLM, forward and "
        f"backward, lowest to highest, on {result.origin['threads']} threads (`bench/results/{result.file}`, "
        "measured by `bench/gemm_libraries.py`). bertfast calls oneDNN on CPUs where it was measured to be "
        "faster.\n\n"
        f"{table(['terms of a sum', 'GEMMs', 'MKL', 'oneDNN', 'oneDNN / MKL, median'], rows)}\n"
    )


def _range(rates: tuple[float, ...]) -> str:
    return f"{min(rates):.0f} to {max(rates):.0f}"


def _ratios(rates: list[tuple[float, float]]) -> str:
    return f"{statistics.median(onednn / mkl for mkl, onednn in rates):.2f} x"
