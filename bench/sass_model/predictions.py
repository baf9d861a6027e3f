"""The page of predicted times, bench/results/sass_model.md, for programs that compare with it."""

from __future__ import annotations

import re
from pathlib import Path

from bench.result_files import RESULTS

PAGE = Path(RESULTS, "sass_model.md")
COLUMNS = "kernel | case | block | registers | per SM | cycles | µs | TFLOP/s | GB/s | of the limit | bound by"


def predicted_times() -> dict[str, float]:
    """Return the times on the page in µs, by "kernel, case"; empty without the page."""
    return microseconds(PAGE.read_text(encoding="utf-8").splitlines() if PAGE.is_file() else [])


def microseconds(lines: list[str]) -> dict[str, float]:
    """Return the times in a table of predictions, by kernel and case."""
    return {key: time for key, time in map(time_of_row, lines) if key}


def time_of_row(line: str) -> tuple[str, float]:
    """Return kernel and case of a row, and its time in µs; an empty name for other lines."""
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) != COLUMNS.count("|") + 1 or not re.fullmatch(r"[\d.]+", cells[6]):
        return "", 0.0
    return f"{cells[0]}, {cells[1]}", float(cells[6])
