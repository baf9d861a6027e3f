"""`bench.sass_model.targets` says which targets the table of predictions reaches, and what bounds the others."""

import pytest

from bench.sass_model import predict, targets
from bench.sass_model.cuda_cases import cuda_cases
from bench.sass_model.cuda_training_cases import cuda_training_cases

HEAD = [f"| {predict.COLUMNS} |", "|---" * 11 + "|"]


def line(kernel: str, case: str, time: float, tflops: str, share: str, bound: str) -> str:
    return f"| {kernel} | {case} | 8 warps | 64 | 1 | 9,000 | {time} | {tflops} | 1,000 | {share} | {bound} |"


ERRORS = {"matmuls": 15, "rows": 1}


def lines_of_targets(table: list[str]) -> list[str]:
    lines = targets.section(table, ERRORS)
    return lines[lines.index("|---" * 7 + "|") + 1 :]


def test_a_missed_target_says_what_bounds_it():
    table = [
        *HEAD,
        line("attention_forward", "length 512", 129.0, "500", "40%", "latency (issue 64%)"),
        line("attention_forward_kernel<BFloat16, 64>", "length 512", 144.2, "357", "36%", "latency (issue 44%)"),
        line("rotary", "12 heads of 64", 72.3, "", "89%", "dram 89%"),
    ]
    kernel = "attention_forward_kernel<BFloat16, 64>"
    assert lines_of_targets(table) == [
        "| attention_forward | length 512 | 390 TFLOP/s | 500 TFLOP/s | +28% | yes |  |",
        f"| {kernel} | length 512 | 415 TFLOP/s | 357 TFLOP/s | -14% | no | latency (issue 44%) |",
        "| rotary | 12 heads of 64 | 90% of the limit | 89% of the limit | -1% | no | dram 89% |",
    ]


def test_a_margin_below_the_models_error_is_not_called_reached():
    table = [
        *HEAD,
        line("attention_forward", "length 512", 129.0, "448", "40%", "latency (issue 64%)"),
        line("attention_forward", "length 128", 50.0, "230", "98%", "dram 98%"),
        line("rotary", "12 heads of 64", 72.3, "", "91%", "dram 91%"),
        line("pre_norm_forward", "768 columns", 72.3, "", "90%", "dram 90%"),
    ]
    reached = {cells[0]: cells[5] for cells in map(targets._cells, lines_of_targets(table))}
    assert reached == {
        "attention_forward": "within the error",
        "rotary": "yes",
        "pre_norm_forward": "within the error",
    }


def test_the_error_is_the_largest_of_a_page(tmp_path):
    page = tmp_path / "sass_model_published.md"
    page.write_text("## largest error +9%\n| 512 | 340 | 361 | +6% |  |\n| 512 | 340 | 300 | -12% | yes |\n")
    assert targets.largest_error(page) == 6
    page.write_text("")
    with pytest.raises(ValueError, match=r"has no column of errors: write it again, see bench/sass_model/published.py"):
        targets.largest_error(page)
    assert targets.published_errors() == ERRORS


def test_a_sum_is_bound_by_the_slowest_of_its_kernels():
    table = [
        *HEAD,
        line("attention_forward", "length 512", 950.0, "450", "36%", "issue 90%"),
        line("attention_d_q", "length 512", 190.1, "339", "34%", "ALU 80%"),
        line("attention_d_kv", "length 512", 450.8, "190", "20%", "latency (issue 43%)"),
        "| both kernels | length 512 | | | | | 640.9 | 201 | | | |",
        line("attention_keys_kernel<BFloat16, 64, 512>", "length 512", 900.0, "143", "14%", "ALU 90%"),
    ]
    assert lines_of_targets(table)[-2] == (
        "| both kernels | length 512 | 250 TFLOP/s | 201 TFLOP/s | -20% | no | attention_d_kv: latency (issue 43%) |"
    )


def test_times_are_at_most_and_shares_at_least_the_target():
    table = [
        *HEAD,
        "",
        "Text between tables.",
        line("linear_cross_entropy", "5,000 x 768 x 30,522, Triton", 1400.0, "500", "64%", "GEMMs 900"),
        line("embeddings_backward", "32,768 tokens, bf16, Triton", 151.0, "", "", "embeddings_backward 67"),
        line("pre-training step", "length 128, fp32 stream, Triton", 37000.0, "490", "61%", "GEMMs 22,900"),
    ]
    step, of_gemms, size = "length 128, fp32 stream, Triton", "790 TFLOP/s", "5,000 x 768 x 30,522"
    assert lines_of_targets(table) == [
        "| embeddings_backward | 32,768 tokens, bf16, Triton | 150 µs | 151 µs | -1% | no | embeddings_backward 67 |",
        f"| linear_cross_entropy | {size}, Triton | 1400 µs | 1400 µs | +0% | within the error | GEMMs 900 |",
        f"| pre-training step | {step} | 62% of {of_gemms} | 61% of {of_gemms} | -2% | no | GEMMs 22,900 |",
    ]


def test_mixed_lengths_are_compared_with_the_padding_of_their_tiles():
    """300 tokens take 384 x 320 scores of a tile of 128 x 64, 1.365 times their own; 512 tokens take their own."""
    kernel, shape = "attention_d_q", "128 x 64, 8 warps"
    cases = {"length 300": "200", "lengths 4 to 512": "220", "length 512": "500"}
    table = [line(kernel, case, 100.0, rate, "40%", "").replace("8 warps", shape) for case, rate in cases.items()]
    (mixed,) = lines_of_targets([*HEAD, *table])
    padding = sum(-(-n // 128) * -(-n // 64) * 128 * 64 for n in range(4, 513, 4)) / sum(
        n * n for n in range(4, 513, 4)
    )
    share = 100 * 220 * padding / (200 * 384 * 320 / 300**2)
    assert mixed.split(" | ")[3] == f"{share:.0f}% ({100 * 220 * padding / 500:.0f}%)"
    assert " | yes | " in mixed
    slow = [row.replace("| 220 |", "| 150 |") for row in table]
    assert " | no | " in lines_of_targets([*HEAD, *slow])[0]


def test_every_target_is_a_row_of_the_table():
    rows = {
        (case.kernel, predict.case_name(launch, case)) for launch in predict.all_launches() for case in launch.cases
    }
    rows |= {(case.kernel, case.case) for case in (*cuda_cases(), *cuda_training_cases())}
    rows.add(("both kernels", "length 512"))
    kernels = [(one.kernel, one.case) for one in targets.TARGETS if not one.case.endswith(("Triton", "fastest"))]
    assert [target for target in kernels if target not in rows] == []
    mixed = [
        (kernel, case) for kernel in targets.MIXED_KERNELS for case in (targets._MIXED_CASE, targets._UNIFORM_CASE)
    ]
    assert [row for row in mixed if row not in rows] == []
