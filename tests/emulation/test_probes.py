"""The instructions of hopper.cuh against numpy: in the emulation, or on a Hopper GPU."""

import numpy as np
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("seed")]

BFLOAT16, HALF = "bf16", "fp16"
DEPTH = 128


def random_matrix(kind: str, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normally distributed 16-bit values: their bits, and their values in float64."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape)
    if kind == HALF:
        half = values.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float64)
    bits = (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


# name of the probe, columns, rows of b, first row of the slice of b: between panels, or within one
SLICES = [
    ("16_of_16_span32", BFLOAT16, 16, 16, 0),
    ("16_of_32_span64", BFLOAT16, 16, 32, 0),
    ("16_of_32_span64", BFLOAT16, 16, 32, 16),  # backward's d_q of heads of 32: 32 bytes into a panel of 64
    ("32_of_32_span64", BFLOAT16, 32, 32, 0),
    ("32_of_64_span128", BFLOAT16, 32, 64, 0),
    ("32_of_64_span128", BFLOAT16, 32, 64, 32),  # of heads of 64: 64 bytes into a panel of 128
    ("64_of_64_none", BFLOAT16, 64, 64, 0),
    ("64_of_64_span64", BFLOAT16, 64, 64, 0),
    ("64_of_64_span128", HALF, 64, 64, 0),
    ("64_of_128_span128", BFLOAT16, 64, 128, 0),
    ("64_of_128_span128", BFLOAT16, 64, 128, 64),  # of heads of 128: the second panel
    ("128_of_128_span64", BFLOAT16, 128, 128, 0),
    ("128_of_128_span128", BFLOAT16, 128, 128, 0),
]


@pytest.mark.parametrize("b_transposed", [False, True])
@pytest.mark.parametrize(("a_transposed", "a_first"), [(False, 0), (False, 64), (True, 0), (True, 64)])
@pytest.mark.parametrize(("name", "kind", "columns", "b_rows", "b_first"), SLICES)
def test_wgmma_reads_every_layout(probes, name, kind, columns, b_rows, b_first, a_transposed, a_first, b_transposed):
    (a, a_values), (b, b_values) = random_matrix(kind, 128, DEPTH), random_matrix(kind, b_rows, DEPTH)
    expected = a_values[a_first : a_first + 64] @ b_values[b_first : b_first + columns].T
    a, b = (np.ascontiguousarray(x.T if turn else x) for x, turn in ((a, a_transposed), (b, b_transposed)))
    options = {"a_first": a_first, "b_first": b_first, "a_transposed": a_transposed, "b_transposed": b_transposed}
    np.testing.assert_allclose(probes.wgmma(name, a, b, columns, **options), expected, atol=5e-4)


def test_wgmma_reads_its_first_operand_from_registers(probes):
    (a, a_values), (b, b_values) = random_matrix(BFLOAT16, 128, DEPTH), random_matrix(BFLOAT16, DEPTH, 64)
    d = probes.wgmma("from_registers", a, b, 64)
    np.testing.assert_allclose(d, a_values[:64] @ b_values, atol=5e-4)


@pytest.mark.parametrize("origin", [(0, 0, 0), (8, 3, 1), (-8, -1, -2), (12, 4, 4), (16, 0, 0), (0, 0, -3)])
def test_boxes_are_zero_out_of_bounds(probes, origin):
    x = np.arange(1, 5 * 6 * 16 + 1, dtype=np.uint16).reshape(5, 6, 16)
    column, row, plane = origin
    padded = np.pad(x, 8)
    expected = padded[8 + plane : 11 + plane, 8 + row : 12 + row, 8 + column : 16 + column]
    assert np.array_equal(probes.box(x, *origin), expected)


def test_ldmatrix_and_stmatrix_transpose(probes):
    x = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = x.copy()
    expected[15] = 0
    assert np.array_equal(probes.transpose(x), expected.T)


@pytest.mark.parametrize("kind", [BFLOAT16, HALF])
def test_mma_of_a_warp(probes, kind):
    (a, a_values), (b, b_values) = random_matrix(kind, 16, 16), random_matrix(kind, 16, 8)
    d = probes.mma(kind, a, b)
    np.testing.assert_allclose(d, a_values @ b_values, atol=1e-5)


def test_blocks_may_end_within_a_warp(probes):
    sums, elected = probes.count(40)
    assert elected == 1
    assert sums.tolist() == [sum(range(i // 8 * 8, i // 8 * 8 + 8)) for i in range(40)]


def test_a_launch_that_no_gpu_could_make_fails(probes):
    with pytest.raises(RuntimeError, match=r"a block has 1 to 1024 threads|the launch failed: invalid"):
        probes.count(1025)
