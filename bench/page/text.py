"""Parts of the page's text: tables and durations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Return seconds in s or ms with three significant digits."""
    # Units and decimals are those of the rounded value: 0.9996 s is 1.00 s, and 0.09996 s is 100 ms.
    value, unit = (seconds, "s") if _rounded(seconds) >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if _rounded(value) >= 100 else f"{value:#.3g} {unit}"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def bound_text(seconds: float | None, gemm_gflops: float | None, reads_weights: bool = False) -> str:
    """Return a lower bound with what it is the time of: FLOPs at a GEMM throughput, if known, or reading weights."""
    if seconds is None:
        return ""
    if reads_weights:
        return f"{duration(seconds)}, reading weights"
    return duration(seconds) + (f" at {gemm_gflops:.0f} GFLOP/s" if gemm_gflops else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
