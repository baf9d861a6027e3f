"""Parts of the page's text: tables and durations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Return seconds in s or ms with three significant digits."""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:#.3g} {unit}"


def bound_text(seconds: float | None, gemm_gflops: float | None) -> str:
    """Return a lower bound with the GEMM throughput that it was computed with, as far as they are known."""
    if seconds is None:
        return ""
    return duration(seconds) + (f" at {gemm_gflops:.0f} GFLOP/s" if gemm_gflops else "")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
