"""docs/BENCHMARKS.md and the README's figures are those of result files that say where they come from."""

import json
import re
from pathlib import Path

import pytest

from bench.bounds import step_bound
from bench.figures import fingerprint, inputs_of, save
from bench.page.document import ahead_cells, ahead_section, document, leaders
from bench.page.learning import groups_of, pairs_of
from bench.page.memory import ahead_in, memory_table, sweep_of
from bench.page.operators import comparisons
from bench.page.rows import Result, Row, missing_reasons, read_results, rows_of
from bench.page.text import bound_text, duration

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_page_is_made_from_the_result_files():
    page = (ROOT / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert page == document(read_results(RESULTS), RESULTS), "run `make bench-figures`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_result_files_that_a_document_names_have_hardware_versions_and_a_clean_commit(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"`(bench/results/[\w./*-]+\.json)`", text):
        files = list(ROOT.glob(name))
        assert files, f"{page.name} names {name}, which does not exist"
        for file in files:
            if file.name != "published.json":  # of others
                origin = json.loads(file.read_text(encoding="utf-8"))["origin"]
                assert re.fullmatch("[0-9a-f]{12}", origin["commit"]), f"{name}: {origin['commit']}"
                assert origin["processor"]
                assert origin["threads"] > 0
                assert {"torch", "transformers"} <= origin["versions"].keys()


@pytest.mark.parametrize("entry", json.loads((RESULTS / "published.json").read_text(encoding="utf-8"))["published"])
def test_published_figures_have_a_link_to_their_source(entry):
    assert re.fullmatch(r"https://(arxiv\.org/abs/\d{4}\.\d{5}|github\.com/[\w./-]+)", entry["url"])
    assert f"[{entry['source']}]({entry['url']})" in (ROOT / "docs" / "BENCHMARKS.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("result", read_results(RESULTS), ids=lambda result: result.file)
def test_every_result_file_has_hardware_versions_and_a_clean_commit(result):
    assert re.fullmatch("[0-9a-f]{12}", result.origin["commit"])
    assert result.origin["processor"]
    assert result.origin["threads"] > 0
    assert {"torch", "transformers"} <= result.origin["versions"].keys()


def test_the_losses_in_the_readme_are_those_of_the_results():
    wikipedia = groups_of(read_results(RESULTS))["wikipedia"]
    target, group = next(pair for title, *pair in pairs_of(wikipedia) if title.startswith("the best of 3"))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"a masked-LM loss of {group.loss('chunks'):.2f} in {group.runs[0].values['minutes']} minutes" in text
    assert f"one of {target.loss('chunks'):.2f} in {target.runs[0].values['minutes']} minutes" in text


@pytest.mark.parametrize("plot", [*RESULTS.rglob("*.png"), *(ROOT / "docs").rglob("*.png")], ids=lambda path: path.stem)
def test_plots_show_the_result_files_of_now(plot):
    known = {fingerprint(json.loads(path.read_text(encoding="utf-8"))) for path in RESULTS.rglob("*.json")}
    inputs = inputs_of(plot)
    assert inputs, "it was drawn without `bench.figures.save`"
    assert set(inputs) <= known, "run `make bench-figures`"


def test_a_plot_of_another_result_is_out_of_date(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = [{"seconds": 1.0}, {"seconds": 2.0}]
    save(pyplot.figure(), tmp_path / "plot.png", results)
    assert inputs_of(tmp_path / "plot.png") == [fingerprint(result) for result in results]
    assert fingerprint(results[0]) != fingerprint(results[1])
    pyplot.figure().savefig(tmp_path / "plot.png")
    assert inputs_of(tmp_path / "plot.png") == []


@pytest.mark.parametrize("row", [row for result in read_results(RESULTS) for row in rows_of(result)], ids=str)
def test_no_system_is_faster_than_the_lower_bound(row):
    # The bound counts all rows of the last layer, of which bertfast computes only those that are read.
    skips = row.workload.startswith(("pre-training step", "fine-tuning step", "patched MiniLM", "fine-tuned MiniLM"))
    share = 0.8 if skips and row.is_bertfast else 0.97
    assert row.lower_bound is None or row.precision == "int8" or row.seconds > share * row.lower_bound


def readme_rows(first: str) -> list[list[str]]:
    """Return the cells of the README's table whose first column has this name, without its two header lines."""
    lines = README.split(f"\n| {first} |")[1].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


@pytest.mark.parametrize("cells", readme_rows("workload"), ids=lambda cells: " ".join(cells[:2]))
def test_the_table_of_inference_of_the_readme_is_that_of_its_result_file(cells):
    workload, precision, *figures = cells
    result = read(RESULTS / "avx512" / "inference-base.json")
    keys = {"one sentence of 8 tokens": "1 x 8 tokens", "64 sentences of SST-2, in file order": "sst2, file order"}
    timed = result["workloads"][keys[workload]]["runtimes"]
    seconds = {name: timed[name]["median_s"] for name, of in result["precisions"].items() if of == precision}
    own = seconds.pop("bertfast" if precision == "fp32" else f"bertfast, {precision}")
    fastest = min(seconds, key=seconds.__getitem__)
    name, other = fastest.removesuffix(f", {precision}"), seconds[fastest]
    assert figures == [f"{1e3 * own:.1f}", f"{1e3 * other:.1f}, {name}", f"{other / own:.2f}"]


@pytest.mark.parametrize("cells", readme_rows("model"), ids=lambda cells: " ".join(cells[:3]))
def test_the_table_of_the_readme_is_that_of_its_result_files(cells):
    model, batch, cpu, *figures = cells
    preset, precision = model.split(", ")
    sequences, length = re.fullmatch(r"(\d+) . ≤ (\d+) tokens", batch).groups()
    folder = RESULTS / "avx512" if cpu == "AVX-512" else RESULTS
    file = folder / f"pretraining_step-{preset}-{length}-{precision}.json"
    result = json.loads(file.read_text(encoding="utf-8"))
    assert len(result["lengths"]) == int(sequences)
    names = ("transformers-sdpa_median_s", "transformers-compile_median_s", "bertfast_median_s")
    ratio = min(result[name] for name in names[:2]) / result["bertfast_median_s"]
    assert figures == [f"{value:.2f}" for value in (*(result[name] for name in names), step_bound(result), ratio)]


def test_the_readme_says_how_many_slots_of_its_batches_are_tokens():
    slots, tokens = re.search(r"Of the ([\d,]+) slots of each batch, ([\d,]+) are tokens", README).groups()
    files = [
        *RESULTS.glob("pretraining_step-*.json"),
        *RESULTS.glob("avx512/pretraining_step-[bs]*-128-[bf][fp]*.json"),
    ]
    found = {(f"{values['padded_tokens']:,}", f"{values['tokens']:,}") for values in map(read, files)}
    assert found == {(slots, tokens)}


def test_a_lower_bound_of_reading_weights_has_no_gemm_rate():
    rows = rows_of(Result("inference-base.json", read(RESULTS / "avx512" / "inference-base.json")))
    reads = {row.workload.rpartition(", ")[2] for row in rows if row.reads_weights}
    assert reads == {"1 x 8 tokens"}
    assert bound_text(0.002, 431) == "2.00 ms at 431 GFLOP/s"
    assert bound_text(0.002, 431, reads_weights=True) == "2.00 ms, reading weights"


def test_steps_of_transformers_in_fp32_are_not_shown_next_to_another_run_of_them():
    rows = rows_of(Result("pretraining_step-a.json", read(RESULTS / "avx512" / "pretraining_step-base-128-bf16.json")))
    assert {row.precision for row in rows} == {"bf16"}


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_text_of_the_readme_picture_has_the_figures_of_the_table():
    text = re.search(r"!\[(Seconds of a BERT-base .*?)\]", README, re.DOTALL)[1]
    base = next(cells for cells in readme_rows("model") if (cells[0], cells[2]) == ("base, fp32", "AVX-512"))
    assert re.findall(r"\d+\.\d\d", text) == base[3:7]


def row(system: str, precision: str, seconds: float, spread: tuple[float, float] | None = None) -> Row:
    return Row("inference", precision, system, seconds, spread or (seconds, seconds), None, 2, (seconds,), "file.json")


def timed(system: str, precision: str, *samples: float, file: str = "file.json") -> Row:
    return Result(file, {"origin": {"threads": 2}}).row("inference", precision, system, samples)


def test_alternatives_that_are_ahead_are_found_at_equal_precision():
    fused = [row("bertfast", "fp32", 2.0), row("bertfast, bf16", "bf16", 1.0)]
    others = [row("OpenVINO", "fp32", 1.5), row("OpenVINO, bf16", "bf16", 1.5), row("OpenVINO, int8", "int8", 0.5)]
    assert [(a.system, b.precision) for a, b in leaders(fused + others)] == [
        ("OpenVINO", "fp32"),
        ("OpenVINO, int8", "fp32"),
    ]
    quantised = [*fused, row("bertfast, int8", "int8", 0.4)]
    assert [(a.system, b.precision) for a, b in leaders(quantised + others)] == [("OpenVINO", "fp32")]


def test_an_alternative_that_is_faster_within_the_spread_is_not_ahead():
    fused = row("bertfast", "fp32", 2.0, (1.8, 2.2))
    assert leaders([fused, row("OpenVINO", "fp32", 1.9, (1.8, 2.0))]) == []
    assert len(leaders([fused, row("OpenVINO", "fp32", 1.7, (1.6, 1.79))])) == 1


def test_an_alternative_is_ahead_if_it_wins_nearly_all_paired_rounds():
    fused = timed("bertfast", "fp32", 1.0, 2.0, 3.0, 4.0, 5.0)  # the machine slows down
    wins = timed("OpenVINO", "fp32", 0.9, 1.9, 2.9, 3.9, 4.9)
    assert leaders([fused, wins]) == [(wins, fused)]
    assert ahead_cells((wins, fused))[-1] == "1.03 x"  # 3.0 / 2.9, though the range of all times is wide
    assert leaders([fused, timed("OpenVINO", "fp32", 0.5, 1.0, 1.5, 2.0, 5.1)]) == []  # four of five
    assert leaders([fused, timed("OpenVINO", "fp32", *wins.samples, file="other.json")]) == []  # other rounds
    eight = timed("bertfast", "fp32", *[1.0] * 8)
    assert leaders([eight, timed("OpenVINO", "fp32", *[0.9] * 7, 1.1)])
    assert not leaders([eight, timed("OpenVINO", "fp32", *[0.9] * 6, *[1.1] * 2)])


def test_other_precisions_are_listed_after_all_workloads_at_equal_precision():
    entry = {"lengths": [8], "batch": 1, "lower_bound_s": {}}
    seconds = {"bertfast": 3.0, "OpenVINO": 2.0, "OpenVINO, int8": 1.0}
    workload = entry | {"runtimes": {name: {"seconds": [value] * 5} for name, value in seconds.items()}}
    values = {
        "origin": {"threads": 2, "processor": "one"}, "model": "base", "ceilings": {},
        "precisions": {"bertfast": "fp32", "OpenVINO": "fp32", "OpenVINO, int8": "int8"},
        "workloads": {"1 x 8 tokens": workload, "1 x 32 tokens": workload},
    }  # fmt: skip
    section = ahead_section({"one": [Result("inference-base.json", values)]})
    assert re.findall(r"\| OpenVINO, (\w+) \|", section) == ["fp32", "fp32", "int8", "int8"]


def test_operators_are_compared_with_the_fastest_alternative():
    def run(name, median):
        info = {"operation": "attention", "case": "8x512", "direction": "forward", "implementation": name}
        info |= {
            "p20_s": 0.99 * median,
            "p80_s": 1.01 * median,
            "roofline_efficiency": 0.5,
            "relative_time": median / 2,
        }
        return {"extra_info": info, "stats": {"median": median}}

    runs = [run(*pair) for pair in (("bertfast", 2.0), ("sdpa", 3.0), ("sdpa-loop", 1.0), ("bertfast-p0", 0.1))]
    values = {"origin": {"threads": 2}, "benchmarks": runs}
    (found,) = comparisons(Result("cpu_operators.json", values))
    assert found.is_behind
    assert found.cells[4:] == ["SDPA, a call per sequence 1.00 s", "0.50 x", "50%"]


def test_results_of_inference_become_rows_with_their_lower_bound():
    workload = {
        "lengths": [8, 8], "batch": 2, "lower_bound_s": {"fp32": 0.5},
        "runtimes": {name: {"seconds": [1.0, 2.0, 3.0]} for name in ("bertfast", "PyTorch, int8")},
    }  # fmt: skip
    values = {
        "origin": {"threads": 2}, "model": "base", "precisions": {"bertfast": "fp32", "PyTorch, int8": "int8"},
        "ceilings": {"fp32": 4e11, "bytes": 1e10},
        "workloads": {"sst2, sorted": workload, "1 x 8 tokens": workload},
    }  # fmt: skip
    first, second, *_ = rows_of(Result("inference-base.json", values))
    assert (first.precision, first.seconds, first.lower_bound, second.lower_bound) == ("fp32", 2.0, 0.5, None)
    assert (first.system, second.system) == ("bertfast", "PyTorch")
    assert first.workload == "inference, base, 2 sentences of SST-2 in batches of 2, sorted"
    assert (first.gemm_gflops, second.gemm_gflops) == (400, None)


def test_the_spread_and_the_lower_bound_of_a_sweep_are_shown():
    point = {"implementation": "bertfast", "vocab_size": 10, "seconds": 2.0, "peak_bytes": 2e6}
    measured = {"seconds_samples": [1.0, 2.0, 3.0], "bound_s": 0.5, "bound_bytes": 1e6, "gemm_gflops": 400}
    for values, cells in ((point, ["2.00 s, 2 MB", ""]), (point | measured, ["2.00 s (1.40 s to 2.60 s), 2 MB"])):
        result = Result("vocabulary.json", {"rows": 1, "width": 2, "points": [values]})
        text = memory_table(sweep_of(result))
        assert ("predates the lower bound" in text) == (values is point)
        row = next(line for line in text.splitlines() if line.startswith("| 10 "))
        assert [cell.strip() for cell in row.split("|")[2:4]][: len(cells)] == cells
    assert "500 ms at 400 GFLOP/s, 1 MB" in row


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0.09996, "100 ms"), (0.9996, "1.00 s"), (0.0099996, "10.0 ms"), (99.96, "100 s"), (1234.4, "1234 s")),
        *((0.0987, "98.7 ms"), (0.5, "500 ms"), (9.996, "10.0 s"), (0.000123, "0.123 ms")),
    ],
)
def test_durations_have_three_digits_and_the_unit_of_the_rounded_value(seconds, text):
    assert duration(seconds) == text


def test_less_memory_elsewhere_is_named():
    points = [
        {"implementation": name, "vocab_size": 10, "seconds": seconds, "peak_bytes": size}
        for name, seconds, size in (("bertfast", 1.0, 2e6), ("torch", 2.0, 1e6))
    ]
    points.append({"implementation": "liger", "vocab_size": 10, "reason": "it needs a GPU"})
    result = Result("vocabulary.json", {"rows": 1, "width": 2, "points": points})
    assert ahead_in(sweep_of(result)) == ["torch 1 MB vs 2 MB at 10"]
    assert missing_reasons(result) == {"Liger": "it needs a GPU"}


@pytest.mark.parametrize("file", sorted(RESULTS.rglob("memory_over_time-*.json")), ids=lambda file: file.stem)
def test_memory_stays_level_over_batches_and_lines(file):
    values = json.loads(file.read_text(encoding="utf-8"))
    after_batches = values.get("bytes_after_batches")
    for name, memory in (after_batches or values["peak_bytes_by_lines"]).items():
        fewer, more = memory.values()
        assert more <= 1.2 * fewer or name.startswith("transformers"), name
    if after_batches is not None:
        assert after_batches["bertfast-fp32"]["20000"] <= 1.3 * after_batches["transformers-fp32"]["20000"]
