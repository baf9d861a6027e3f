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


def test_a_sum_is_bound_by_the_slowest_of_its_kernels():
    table = [
        *HEAD,
        line("attention_forward", "length 512", 950.0, "450", "36%", "issue 90%"),
        line("attention_d_q", "length 512", 190.1, "339", "34%", "ALU 80%"),
        line("attention_d_kv", "length 512", 450.8, "190", "20%", "latency (issue 43%)"),
        "| both kernels | length 512 | | | | | 640.9 | 201 | | | |",
        line("attention_keys_kernel<BFloat16, 64, 512>", "length 512", 900.0, "143", "14%", "ALU 90%"),
    ]
    assert targets.section(table)[-2] == (
        "| both kernels | length 512 | 250 TFLOP/s | 201 TFLOP/s | attention_d_kv: latency (issue 43%) |"
    )


def test_every_target_is_a_row_of_the_page():
    rows = {tuple(targets._cells(line)[:2]) for line in predict.PAGE.read_text(encoding="utf-8").splitlines()}
    assert [(one.kernel, one.case) for one in targets.TARGETS if (one.kernel, one.case) not in rows] == []
