"""`bench.sass_model.composed` adds up what a workload launches, as a small one shows by hand."""

import pytest

from bench.sass_model import composed, constants
from bench.sass_model import training_cases as cases
from bench.sass_model.composed import Prices, Time
from bench.sass_model.constants import H200
from bench.sass_model.trace import Call
from bench.sass_model.workloads import STEP, Workload

FP32, BF16 = 4, 2
LAYER_NORM = Time("add_layer_norm_forward", "768 columns, dropout", 64e-6, bound="dram 99%")


def kernel(name: str, operator: str = "", rows: int = 32_768, element: int = BF16, blocks: int = 1) -> Call:
    return Call(name, operator or name, True, 0, 0, rows, element, blocks)


def seconds(calls: list[Call], times: list[Time], fastest: bool = False, **options) -> dict[str, float]:
    workload = Workload(STEP, "", calls, **options)
    return {part.name: part.seconds for part in Prices(times, workload, fastest, H200).parts()}


def test_parts_of_one_name_and_the_gaps_are_summed():
    add = Call("add", "", False, 43 * 10**6, 0)
    calls = [kernel("add_layer_norm_forward"), add, add, kernel("add_layer_norm_forward", rows=16_384)]
    assert seconds(calls, [LAYER_NORM]) == {
        "add_layer_norm_forward": pytest.approx(96e-6),
        "add": pytest.approx(20e-6),
        composed._GAPS: pytest.approx(4 * constants.GRAPH_GAP),
    }


def test_the_largest_part_comes_first():
    calls = [Call("add", "", False, 43 * 10**6, 0), kernel("add_layer_norm_forward")]
    parts = Prices([LAYER_NORM], Workload(STEP, "", calls), False, H200).parts()
    assert [part.name for part in parts] == ["add_layer_norm_forward", "add", composed._GAPS]


def test_an_fp32_stream_has_a_case_of_its_own():
    times = [LAYER_NORM, Time("add_layer_norm_forward", "768 columns, fp32 stream, dropout", 70e-6)]
    found = seconds([kernel("add_layer_norm_forward")], times, stream="fp32")
    assert found["add_layer_norm_forward"] == pytest.approx(70e-6)


BACKWARD = [
    Time("attention_d_q", "length 512, dropout", 200e-6),
    Time("attention_d_kv", "length 512, dropout", 300e-6),
    Time("delta_kernel<BFloat16, 64>", "length 512, dropout", 50e-6, cuda=True),
    Time("attention_keys_kernel<BFloat16, 64, 512>", "length 512, dropout", 400e-6, cuda=True),
    Time("attention_forward_kernel<BFloat16, 64>", "length 512, dropout", 9e-6, cuda=True),
]


def test_the_faster_of_both_languages_is_taken_for_all_kernels_of_an_operator():
    calls = [kernel(f"attention_{name}", "attention_backward") for name in ("d_q", "d_kv")]
    assert seconds(calls, BACKWARD, length=512)["attention_backward"] == pytest.approx(500e-6)
    assert seconds(calls, BACKWARD, fastest=True, length=512)["attention_backward"] == pytest.approx(450e-6)
    slower = [*BACKWARD, Time("attention_queries_kernel<BFloat16, 64>", "length 512, dropout", 100e-6, cuda=True)]
    assert seconds(calls, slower, fastest=True, length=512)["attention_backward"] == pytest.approx(500e-6)


def test_the_kernel_of_short_sequences_finds_nothing_in_long_ones():
    calls = [kernel("attention_backward_short", "attention_backward", blocks=265)]  # three per SM
    expected = 3 * (constants.BLOCK_START + 2 * constants.L2_LATENCY) / H200.clock
    assert seconds(calls, BACKWARD, length=512)["attention_backward"] == pytest.approx(expected)


def test_embeddings_read_tables_whose_dtype_is_not_that_of_the_stream():
    times = [Time("embeddings_forward", f"{cases.TABLES}, {dtype}", time) for dtype, time in (("bf16", 3), ("fp32", 5))]
    assert seconds([kernel("embeddings_forward", element=FP32)], times, stream="bf16")["embeddings_forward"] == 5
    assert seconds([kernel("embeddings_forward", element=BF16)], times, stream="bf16")["embeddings_forward"] == 3


def test_the_loss_in_cuda_is_taken_where_it_is_faster():
    names = ("cross_entropy", "cross_entropy_gradient")
    calls = [kernel(name, "linear_cross_entropy_forward", rows=cases.CHUNK_ROWS) for name in names]
    triton = [Time(name, cases.LOSS, 80e-6) for name in names]
    cuda = [Time(f"{name}_kernel<BFloat16, true>", cases.LOSS, 60e-6, cuda=True) for name in ("loss", "gradient")]
    assert seconds(calls, [*triton, *cuda], fastest=True)["linear_cross_entropy_forward"] == pytest.approx(120e-6)


SUMS = [
    Time("sum_blocks", f"{cases.EQUAL_BLOCKS}, bf16", 10e-6),
    Time("sum_groups", f"{cases.WITHOUT}, bf16", 8e-6),
    Time("sum_groups", f"{cases.WITH}, bf16", 20e-6),
    Time("sum_groups", f"{cases.LONGEST}, bf16", 25e-6),
    Time("sum_groups", f"{cases.USED_POSITIONS}, bf16", 6e-6),
]


def test_sums_of_embeddings_take_as_long_as_all_rows_or_the_longest_one():
    calls = [kernel("sum_groups", "embeddings_backward", blocks=rows) for rows in (cases.VOCAB, cases.POSITIONS)]
    assert seconds(calls, SUMS)["embeddings_backward"] == pytest.approx(28e-6 + 6e-6)
    slow = [*SUMS[:3], Time("sum_groups", f"{cases.LONGEST}, bf16", 40e-6), SUMS[4]]
    assert seconds(calls, slow)["embeddings_backward"] == pytest.approx(40e-6 + 6e-6)


def test_a_gather_has_rows_with_one_gradient_and_rows_without():
    empty = cases.VOCAB - cases.DISTINCT
    calls = [kernel("sum_groups", "gather_backward", rows=cases.DISTINCT // 2, blocks=cases.DISTINCT // 2 + empty)]
    assert seconds(calls, SUMS)["gather_backward"] == pytest.approx(20e-6 / 2 + 8e-6)


def test_a_kernel_without_a_prediction_is_an_error():
    with pytest.raises(ValueError, match=r"no row of bias_gelu_forward, 3,072 columns: add it to"):
        seconds([kernel("bias_gelu_forward")], [LAYER_NORM])


def test_a_row_has_the_share_of_the_gemms_rate():
    calls = [Call("mm", "", False, 0, 0, gemm=(128 * 132, 768, 768)), kernel("add_layer_norm_forward")]
    workload = Workload(STEP, "small", calls, flop=4 * 128 * 132 * 768 * 768)  # twice those of the GEMM
    cells = composed.row(Prices([LAYER_NORM], workload, False, H200), "Triton")
    gemm = 2e6 * 128 * 132 * 768 * 768 / constants.GEMM_FLOPS
    total = gemm + 64 + 2
    assert cells[:4] == [STEP, "small, Triton", f"{gemm / total:.0%}", "2"]
    assert [float(cell) for cell in cells[4:7]] == pytest.approx([gemm, 64, total], abs=0.05)
    contents = f"add_layer_norm_forward 64: dram 99%; GEMMs {gemm:.0f}; others 2"
    assert cells[8:] == ["2.0", f"{2 * gemm / total:.0%}", contents]


def test_small_parts_of_a_step_are_summed():
    parts = [
        composed.Part("GEMMs", False, 3, 900e-6),
        composed.Part("add", False, 2, 1e-6),
        composed.Part("mul", False, 4, 1e-6),
    ]
    assert composed.breakdown({"length 128": parts})[-2:] == ["| GEMMs | 900 (3) |", "| others | 2 (6) |"]
