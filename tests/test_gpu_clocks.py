"""The clocks of a GPU are recorded while a check runs, and summarised in its report."""

import os
import time

import pytest

from bench import gpu_clocks, report

NVIDIA_SMI = """#!/bin/sh
echo "timestamp, clocks.current.sm [MHz], clocks.current.memory [MHz], power.draw [W], temperature.gpu"
echo "2026/01/01 12:00:00.000, 345, 2619, 120.50, 33"
echo "2026/01/01 12:00:00.500, 1980, 2619, [N/A], 41"
echo "2026/01/01 12:00:01.000, 1830, 2619, 690.00, 62"
printf "2026/01/01 12:00:01.500, 19"
exec sleep 60
"""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A file that a program instead of nvidia-smi wrote until it was interrupted."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    file = tmp_path / gpu_clocks.FILE
    started = time.monotonic()
    with gpu_clocks.recorded_clocks(file):
        while not (file.exists() and file.read_text().endswith(" 19")) and time.monotonic() < started + 30:
            time.sleep(0.01)
    assert time.monotonic() < started + 30  # the program has been ended
    return file


def test_clocks_are_summarised_without_missing_values_and_the_line_that_is_cut_off(recorded):
    found = {name: values for name, *values in gpu_clocks.summarised(recorded)}
    assert found["SM clock, MHz"] == [345, 1830, 1980]
    assert found["power, W"] == [120.5, 405.25, 690]
    assert found["temperature, °C"] == [33, 41, 62]


def test_the_report_has_a_table_of_clocks(recorded):
    assert "| SM clock, MHz | 345 | 1830 | 1980 |" in report.clocks([recorded.parent])
    recorded.unlink()
    assert report.clocks([recorded.parent, recorded]) == ""


def test_without_nvidia_smi_nothing_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpu_clocks.recorded_clocks(tmp_path / gpu_clocks.FILE):
        pass
    assert not (tmp_path / gpu_clocks.FILE).exists()
