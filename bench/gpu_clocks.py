"""Record the clock, power and temperature of the GPU while something runs: they explain times that vary.

nvidia-smi writes them to a CSV file, with the local time, which the report summarises.
"""

from __future__ import annotations

import csv
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FILE = "clocks.csv"
INTERVAL = 500  # milliseconds between two lines
QUERIES = {"clocks.sm": "SM clock, MHz", "clocks.mem": "memory clock, MHz", "power.draw": "power, W"}
QUERIES |= {"temperature.gpu": "temperature, °C"}


@contextmanager
def recorded_clocks(file: Path) -> Iterator[None]:
    """Write a line to a CSV file every half second while the body runs; without nvidia-smi there is no file."""
    program = shutil.which("nvidia-smi")
    if program is None:
        yield
        return
    queries = ",".join(["timestamp", *QUERIES])
    command = [program, f"--query-gpu={queries}", "--format=csv,nounits", f"--loop-ms={INTERVAL}"]
    with file.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait()


def summarised(file: Path) -> list[tuple[str, float, float, float]]:
    """Return minimum, median and maximum of each column of such a file, with its name; [] if there are no values."""
    whole_lines = file.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()  # the last one may be cut off
    rows = list(csv.reader(whole_lines, skipinitialspace=True))[1:]
    found = []
    for column, name in enumerate(QUERIES.values(), start=1):
        values = [float(row[column]) for row in rows if len(row) > column and _is_number(row[column])]
        if values:
            found.append((name, min(values), statistics.median(values), max(values)))
    return found


def _is_number(text: str) -> bool:
    """Return whether a value is a number; nvidia-smi writes "[N/A]" for one that the GPU does not have."""
    try:
        float(text)
    except ValueError:
        return False
    return True
