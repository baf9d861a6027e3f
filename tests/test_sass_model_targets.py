"""`bench.sass_model.targets` says which targets the table of predictions reaches, and what bounds the others."""

from bench.sass_model import predict, targets
from bench.sass_model.cuda_cases import cuda_cases

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


def test_times_are_at_most_and_shares_at_least_the_target():
    table = [
        *HEAD,
        "",
        "Text between tables.",
        line("linear_cross_entropy", "5,000 x 768 x 30,522, Triton", 1400.0, "500", "64%", "GEMMs 72%"),
        line("embeddings_backward", "32,768 tokens, bf16, Triton", 151.0, "", "", "embeddings_backward 71%"),
        line("pre-training step", "length 128, fp32 stream, Triton", 37000.0, "490", "61%", "GEMMs 61%"),
    ]
    assert targets.section(table)[7:] == [
        "| embeddings_backward | 32,768 tokens, bf16, Triton | 150 µs | 151 µs | embeddings_backward 71% |",
        "| linear_cross_entropy | 5,000 x 768 x 30,522, Triton | 1400 µs | 1400 µs |  |",
        "| pre-training step | length 128, fp32 stream, Triton | 62% of 790 TFLOP/s | 61% of 790 TFLOP/s | GEMMs 61% |",
    ]


def test_every_target_is_a_row_of_the_table():
    rows = {
        (case.kernel, predict.case_name(launch, case)) for launch in predict.all_launches() for case in launch.cases
    }
    rows |= {(case.kernel, case.case) for case in cuda_cases()}
    rows.add(("both kernels", "length 512"))
    kernels = [(one.kernel, one.case) for one in targets.TARGETS if not one.case.endswith(("Triton", "fastest"))]
    assert [target for target in kernels if target not in rows] == []
