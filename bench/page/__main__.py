"""Write docs/BENCHMARKS.md and its plots from the files in bench/results/.

    python -m bench.page [--check]

`--check` only compares: the exit status is 1 if the page is not what the result files give.
"""

from __future__ import annotations

import argparse
import sys

from bench.page.document import document
from bench.page.plots import draw
from bench.page.rows import read_results
from bench.result_files import RESULTS, ROOT

PAGE = ROOT / "docs" / "BENCHMARKS.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare the page with the result files")
    arguments = parser.parse_args()
    results = read_results(RESULTS)
    if not arguments.check:
        for path in draw(results, RESULTS):
            print(f"written to {path}")
    text = document(results, RESULTS)
    if arguments.check and PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/BENCHMARKS.md is not what bench/results/ gives: run `make bench-figures`")
    if not arguments.check:
        PAGE.write_text(text, encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
