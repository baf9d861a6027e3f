"""A speed, a ratio of times or a memory in a document stands next to the result file that it was measured in."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if page.name != "BENCHMARKS.md"]  # made from the files
QUALITY = r"(?:fast|slow|long|many|much|quick|large|small)"
SYSTEMS = r"(?:transformers|PyTorch|ONNX|OpenVINO|SDPA|MKL|sentence-transformers)"
# Speeds, times, memory of processes and ratios of them, which somebody measured; not sizes of files.
MEASURED = re.compile(
    r"\d\s?(?:tokens/s|sequences/s|[GT]?FLOPs?/s|[GT]B/s|[mµ]s\b)"
    r"|\d\s(?:s|seconds)\b"
    r"|(?:peaks?|memory|resident|takes?|took|needs?|uses?)\s(?:[\w-]+\s){0,3}[\d.,]*\d\s[GM]i?B\b"
    rf"|\d\s?(?:times\s|[x\u00d7]\s?)(?:as\s{QUALITY}|faster|slower|quicker|longer|less|more|{SYSTEMS})\b"
    rf"|\b(?:twice|thrice|half|(?:two|three|four|five|six|seven|eight|nine|ten)\stimes)\sas\s{QUALITY}\b"
    r"|\d\s?%\s(?:faster|slower|quicker|longer|less\stime|more\stime|as\sfast)"
)
# A limit that somebody set, before the last digit of a figure or in the header of a table.
LIMIT = re.compile(r"\b(?:at\smost|less\sthan|up\sto|under|within|after|every)\s[\d.,]*$")
RESULT = re.compile(r"bench/results/[\w./*-]*\w")


def unsourced_figures(text: str) -> list[str]:
    """Return the measured figures of a document in paragraphs that name no result file that exists."""
    found = []
    for part in re.split(r"\n\s*\n", text):
        if any(path.is_file() for name in RESULT.findall(part) for path in ROOT.glob(name)):
            continue
        if part.startswith("|") and "at most" in part.splitlines()[0]:
            continue
        for match in MEASURED.finditer(part):
            if not LIMIT.search(part[: match.start()]) and "at most" not in match[0]:
                found.append(match[0])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_measured_figures_stand_next_to_their_result_file(page):
    assert unsourced_figures(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("text", "figures"),
    [
        ("One is 2.1 times as fast as\nMKL.", ["1 times as fast"]),
        ("Another is 10 to 15 % slower, 45 % more memory.", ["5 % slower"]),
        ("It takes 8 ms and reaches 3,164 tokens/s, at\n20 GFLOP/s.", ["8 ms", "4 tokens/s", "0 GFLOP/s"]),
        ("It is 4.05x faster, or 8.1\u00d7 faster.", ["5x faster", "1\u00d7 faster"]),
        ("A step takes 4.05 x transformers' time.", ["5 x transformers"]),
        ("A step takes 7.28 s, the demo 12 seconds.", ["8 s", "2 seconds"]),
        ("It is twice as fast, and three times as fast there.", ["twice as fast", "three times as fast"]),
        ("It takes 710 MB. The peak is 1.2 GB.", ["takes 710 MB", "peak is 1.2 GB"]),
        ("It takes 8 ms (`bench/results/no-such-file.json`).", ["8 ms"]),
        ("| run | time |\n|---|---|\n| demo | 397 s |", ["7 s"]),
    ],
)
def test_measured_figures_without_a_result_file_are_found(text, figures):
    assert unsourced_figures(text) == figures


@pytest.mark.parametrize(
    "text",
    [
        "It takes 8 ms (`bench/results/data.json`), and 9 ms (`bench/results/pretraining_step-*.json`).",
        "Tiles of 6 x 2; 0 times NaN; ≤ 128 tokens; 16 x ≤ 128 tokens.",
        "A file of 40 MiB, a dependency of 1.6 GB. Its logits take at most 256 MiB, in less than 90 seconds.",
        "A checkpoint every 600 seconds, after 5 s; shards of 64 MB.",
        "| part | at most |\n|---|---|\n| ceilings | 15 s |",
    ],
)
def test_sizes_and_limits_are_no_measurements(text):
    assert unsourced_figures(text) == []
