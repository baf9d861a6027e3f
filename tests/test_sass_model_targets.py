"""`bench.sass_model.targets` says which targets the table of predictions reaches, and what bounds the others."""

from bench.sass_model import predict, targets

HEAD = [f"| {predict._COLUMNS} |", "|---" * 11 + "|"]


def line(kernel: str, case: str, time: float, tflops: str, share: str, bound: str) -> str:
    return f"| {kernel} | {case} | 8 warps | 64 | 1 | 9,000 | {time} | {tflops} | 1,000 | {share} | {bound} |"


def test_a_missed_target_says_what_bounds_it():
    table = [
        *HEAD,
        line("attention_forward", "length 512", 129.0, "400", "40%", "latency (issue 64%)"),
        line("attention_forward_kernel<BFloat16, 64>", "length 512", 144.2, "357", "36%", "latency (issue 44%)"),
        line("rotary", "12 heads of 64", 72.3, "", "89%", "dram 89%"),
    ]
    assert targets.section(table)[7:] == [
        "| attention_forward | length 512 | 390 TFLOP/s | 400 TFLOP/s |  |",
        "| attention_forward_kernel<BFloat16, 64> | length 512 | 415 TFLOP/s | 357 TFLOP/s | latency (issue 44%) |",
        "| rotary | 12 heads of 64 | 90% of the limit | 89% of the limit | dram 89% |",
    ]


def test_a_sum_is_bound_by_the_slowest_kernel_of_its_language():
    table = [
        *HEAD,
        line("attention_d_kv", "length 512", 900.0, "100", "10%", "ALU 90%"),
        line("attention_forward_kernel<BFloat16, 64>", "length 512", 950.0, "450", "36%", "issue 90%"),
        line("delta_kernel<BFloat16, 64>", "length 512", 24.3, "", "98%", "dram 98%"),
        line("attention_keys_kernel<BFloat16, 64, true>", "length 512", 450.8, "286", "29%", "latency (issue 43%)"),
        "| both kernels, CUDA C++ | length 512 | | | | | 475.1 | 271 | | | |",
    ]
    assert targets.section(table)[-1] == (
        "| both kernels, CUDA C++ | length 512 | 360 TFLOP/s | 271 TFLOP/s "
        "| attention_keys_kernel<BFloat16, 64, true>: latency (issue 43%) |"
    )


def test_every_target_is_a_row_of_the_page():
    rows = {tuple(targets._cells(line)[:2]) for line in predict.PAGE.read_text(encoding="utf-8").splitlines()}
    assert [(one.kernel, one.case) for one in targets.TARGETS if (one.kernel, one.case) not in rows] == []
