"""The int8 GEMMs that use AMX: the same machine code that a CPU with AMX runs, emulated where there is none."""

import re
import shutil
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import amx
import pytest
import torch
from helpers import normal
from test_packed_linear import BF16, FLOAT, HIGHEST, LOWEST, extremes, inputs

from bertfast.ops import native
from bertfast.ops.packed_linear import PackedWeight, packed_int8, packed_linear, quantise

pytestmark = pytest.mark.skipif(not amx.IS_AVAILABLE, reason="AMX is emulated on Linux on x86-64, with g++")

SHAPES = [  # N, K
    (3, 5),  # less than a tile, than an operand
    (33, 50),  # two panels, the second with one row; less than a tile's 64 values
    (16, 64),  # one tile of a panel's two
    (96, 768),  # one partial sum
    (64, 1541),  # three partial sums, the last one with a part of an operand
]
of_each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
TOKENS = [17, 31, 32, 33, 48, 49, 64, 70]  # one and two tiles in the last strip, whole and not


def tiled(x: torch.Tensor, weight: PackedWeight, activation="none", **options) -> torch.Tensor:
    """Return `packed_linear`, computed in tiles; fail if it was not."""
    before, is_emulated = amx.executed(), not amx.is_native()
    with amx.tiles():
        y = packed_linear(x, weight, activation, implementation="cpu", **options)
    executed = amx.executed() - before
    assert (executed["multiplied"] > 0) == (is_emulated and weight.depth > 0)
    assert executed["configured"] == executed["released"]
    return y


def untiled(x: torch.Tensor, weight: PackedWeight, activation="none", **options) -> torch.Tensor:
    torch.ops.bertfast.use_tiles(False)
    y = packed_linear(x, weight, activation, implementation="cpu", **options)
    torch.ops.bertfast.use_tiles(None)
    return y


@of_each_shape
@pytest.mark.parametrize("tokens", TOKENS)
def test_sums_are_bitwise_those_without_tiles(tokens, shape):
    x, weight, bias = inputs((tokens, *shape))
    packed = quantise(weight, bias)
    assert torch.equal(tiled(x, packed), untiled(x, packed))


@of_each_shape
@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtypes", [(FLOAT, BF16), (BF16, FLOAT), (BF16, BF16)], ids=str)
def test_epilogues_and_dtypes_are_those_without_tiles(dtypes, activation, shape):
    x, weight, bias = inputs((37, *shape))
    packed = quantise(weight, bias if activation == "gelu" else None, normal(shape[1], seed=3).detach().float().abs())
    options = {"activation": activation, "dtype": dtypes[1]}
    assert torch.equal(tiled(x.to(dtypes[0]), packed, **options), untiled(x.to(dtypes[0]), packed, **options))


@pytest.mark.parametrize("tokens", range(1, 71))
@pytest.mark.one_instruction_set
def test_every_number_of_tokens_gives_the_sums_without_tiles(tokens):
    x, weight, bias = inputs((tokens, 33, 70))
    packed = quantise(weight, bias)
    with amx.tiles():
        actual = packed_linear(x, packed, implementation="cpu")
    assert torch.equal(actual, untiled(x, packed))


@pytest.mark.parametrize("depth", [1, 3, 4, 5, 63, 64, 65, 769, 1541, 3072])
def test_sums_of_extreme_values_are_exact_at_all_positions(depth):
    """As in `test_packed_linear`: weights of -128 and 127, and tokens of 1 and 255."""
    values = extremes(-128, 127, depth).to(torch.int8).repeat(3, 1)
    tokens = extremes(LOWEST, HIGHEST, depth).repeat(3, 1)
    both = torch.tensor([LOWEST, HIGHEST]).expand(len(tokens), -1)
    weight = packed_int8(torch.nn.functional.pad(values, (2, 0)), torch.ones(len(values)), None, None)
    actual = tiled(torch.cat([both, tokens], dim=1), weight)
    assert torch.equal(actual, (tokens.round().long() @ values.long().T).float())


def test_memory_of_earlier_calls_is_not_read():
    """What is beyond K in a tile is multiplied by zeros: memory of earlier calls holds the largest values there."""
    x, weight, bias = inputs((40, 37, 770))
    packed = quantise(weight, bias)
    expected = untiled(x, packed)
    for value in (float("nan"), 1e30, -1e30):
        rows = torch.full((64, 2108), value)
        rows[:, ::2] *= -1
        tiled(rows, quantise(torch.ones(70, 2108)))
        assert torch.equal(tiled(x, packed), expected)
        assert torch.equal(tiled(x[:17], packed), expected[:17])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_gives_nan_alone(value):
    x, weight, bias = inputs((35, 40, 64))
    x[2, 17] = x[33, 0] = value
    y = tiled(x, quantise(weight, bias))
    assert y[[2, 33]].isnan().all()
    y[[2, 33]] = 0
    assert y.isfinite().all()


def test_a_weight_without_rows_of_x_to_sum():
    bias = normal(40).detach().float()
    y = tiled(torch.ones(20, 0), quantise(torch.ones(40, 0), bias))
    assert torch.equal(y, bias.expand(20, -1))


@pytest.mark.parametrize("shape", [(100, 160, 300), (200, 64, 2500)], ids=["one packs", "several pack"])
def test_results_do_not_depend_on_the_number_of_threads(shape):
    x, weight, bias = inputs(shape)
    packed, threads = quantise(weight, bias), torch.get_num_threads()
    results = [untiled(x, packed, "gelu")]
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(tiled(x, packed, "gelu"))
    torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_tile_multiplies_as_many_times_as_its_operands_need():
    if amx.is_native():
        pytest.skip("this CPU has AMX, so that nothing is emulated")
    x, weight, bias = inputs((49, 64, 130))  # 4 tiles of tokens, 2 panels of 2 tiles, 3 steps of 64 values
    before, threads = amx.executed(), torch.get_num_threads()
    torch.set_num_threads(1)
    tiled(x, quantise(weight, bias))
    torch.set_num_threads(threads)
    assert amx.executed() - before == Counter(
        configured=1, released=1, zeroed=16, multiplied=4 * 4 * 3, stored=16, loaded=2 * 2 * 3 * 4
    )


@pytest.mark.one_instruction_set
def test_few_tokens_are_not_multiplied_in_tiles():
    x, weight, bias = inputs((16, 64, 130))
    before = amx.executed()
    with amx.tiles():
        packed_linear(x, quantise(weight, bias), implementation="cpu")
    assert amx.executed() == before


def test_tiles_are_used_by_default_where_linux_lists_them():
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = set(next(line for line in lines if line.startswith("flags")).split())
    # A build that emulates the wide sets, for sanitizers, has neither VNNI, which all CPUs with AMX have, nor AMX.
    wide = native.instruction_set() in ("avx512", "avx512_bf16") and torch.ops.bertfast.has_quad_instruction()
    assert torch.ops.bertfast.has_tiles() == (wide and {"amx_tile", "amx_int8"} <= flags)


@pytest.mark.one_instruction_set
def test_without_emulation_the_instructions_are_illegal_on_a_cpu_without_amx():
    if amx.is_native():
        pytest.skip("this CPU has AMX")
    code = (
        "import torch; from bertfast.ops.packed_linear import *; torch.ops.bertfast.use_tiles(True);"
        "packed_linear(torch.ones(20, 64), quantise(torch.ones(32, 64)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert ran.returncode == -signal.SIGILL


@pytest.mark.slow
@pytest.mark.one_instruction_set
def test_only_functions_for_tiles_have_amx_instructions():
    """The disassembler confirms encodings and registers, and that nothing else would be illegal without AMX."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(native.path())]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found, function = defaultdict(set), ""
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2]
        elif match := re.search(r"\t(ldtilecfg|sttilecfg|tile\w+|tdp\w+)\b *(.*)", line):
            registers = re.sub(r"[-\w]*\(%\w+(,%\w+,4)?\)", lambda found: "rows" if found[1] else "memory", match[2])
            name = next(
                (name for name in ("multiply_in_tiles<1>", "multiply_in_tiles<2>") if name in function), function
            )
            found["TileRegisters" if "TileRegisters<" in name else name].add(
                f"{match[1]} {re.sub(' +#.*', '', registers)}".strip()
            )
    one = {
        *(f"tilezero %tmm{c}" for c in (0, 1)),
        *(f"tileloadd rows,%tmm{tile}" for tile in (0, 1, 4, 6, 7)),
        *(f"tilestored %tmm{c},rows" for c in (0, 1)),
        "tdpbusd %tmm6,%tmm4,%tmm0",
        "tdpbusd %tmm7,%tmm4,%tmm1",
    }
    two = {
        *(f"tilezero %tmm{c}" for c in (2, 3)),
        *(f"tileloadd rows,%tmm{tile}" for tile in (2, 3, 5)),
        *(f"tilestored %tmm{c},rows" for c in (2, 3)),
        "tdpbusd %tmm6,%tmm5,%tmm2",
        "tdpbusd %tmm7,%tmm5,%tmm3",
    }
    expected = {"multiply_in_tiles<1>": one, "multiply_in_tiles<2>": one | two}
    assert dict(found) == expected | {"TileRegisters": {"ldtilecfg memory", "tilerelease"}}
