"""`bench.sass_model` predicts cycles that follow by hand from short listings with known control words."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from sass_listings import EXIT, Line, listing

from bench.sass_model import constants, control_words, kernel_time, mixed_lengths, occupancy, pipes, sass, schedule
from bench.sass_model.constants import H200
from bench.sass_model.control_flow import Choice, ControlFlow
from bench.sass_model.control_words import Control
from bench.sass_model.memory import Memory
from bench.sass_model.sass import parse
from bench.sass_model.simulator import SubPartition

FMA = ("FFMA R1, R1, R2, R3", Control(4))  # ptxas's stall count for a result that the next instruction reads
WAIT = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def path(*lines: Line, choice: Choice | None = None) -> list[pipes.Step]:
    return kernel_time.steps(listing([*lines, EXIT]), choice or Choice())


def cycles(*paths: list[pipes.Step], slots: int = 1, blocks: int | None = None, memory: Memory | None = None) -> float:
    """Return when the last block ends, of blocks that have a warp with each of these paths."""
    return SubPartition(paths, slots, memory or Memory(H200)).run(blocks or slots).ends[-1]


def names(lines: Sequence[str], choice: Choice) -> list[str]:
    """Return the first words of the instructions on the path."""
    text = listing([(line, Control(1)) for line in lines])
    flow = ControlFlow(parse(text))
    return [flow.instructions[index].opcode for index in flow.path(choice)]


def test_control_words_of_a_real_instruction():
    """LDG.E.128, as ptxas 12.8 encoded it: stall 4, scoreboard 2 for its result, none for its sources, no wait."""
    assert control_words.decode(0x000EA8000C1E1D00) == Control(4, 2, None, ())
    assert control_words.decode(0x004FCA0000000000) == Control(5, None, None, (2,))
    for control in (Control(1), Control(15, 5, 0, (0, 3, 5)), Control(2, None, 1, ())):
        assert control_words.decode(control_words.encode(control)) == control


def test_a_listing_without_encodings_is_refused():
    with pytest.raises(ValueError, match="has 1 instructions and 0 second words of them: print it with `cuobjdump"):
        control_words.parse("/*0000*/ EXIT ; /* 0x0 */")


def test_a_chain_of_dependent_fmas_takes_their_stall_counts():
    assert cycles(path(*[FMA] * 10)) == 40


def test_warps_overlap_until_the_issue_slot_is_full():
    chain = path(*[FMA] * 10)
    assert cycles(chain, slots=4) == 43  # in the three other slots of each four cycles
    assert cycles(chain, slots=8) == 8 * 11 - 1  # 88 instructions, one per cycle


def test_a_loop_of_special_functions_is_bound_by_their_unit():
    """The n-th MUFU starts at 8 n; the branch and EXIT follow the last one."""
    loop = [("MUFU.EX2 R1, R2", Control(1))] * 4 + [("@P0 BRA 0x0", Control(1))]
    once = path(*loop, choice=Choice({"other": 10}))
    assert len(once) == 51
    assert cycles(once) == 8 * 39 + 2
    assert cycles(once, slots=2) == 8 * 79 + 2


def test_fp32_has_two_units_and_integer_multiplication_one():
    def independent(text: str) -> float:
        return cycles(path(*[(text, Control(1))] * 100))

    assert independent("FFMA R1, R2, R3, R4") == 100
    assert independent("IMAD R1, R2, R3, R4") == 2 * 99 + 1
    assert independent("LOP3.LUT R1, R2, R3, R4, 0x96, !PT") == 2 * 99 + 1
    assert independent("IMAD.WIDE.U32 R2, R4, R5, RZ") == 4 * 99 + 1


def test_a_scoreboard_delays_only_what_waits_for_it():
    load = ("LDS R1, [R2]", Control(1, result=0))
    arrival = constants.LATENCY["LDS"] + 4  # it occupies the unit for 4 cycles
    assert cycles(path(load, ("FADD R2, R3, R4", Control(1)))) == 2
    assert cycles(path(load, ("FADD R2, R1, R4", Control(1, waits=(0,))))) == arrival + 1
    assert cycles(path(load, ("FADD R2, R1, R4", Control(1, waits=(1,))))) == 2


def test_a_barrier_waits_for_the_last_warp_of_its_block():
    barrier = ("BAR.SYNC.DEFER_BLOCKING 0x0", Control(1))
    early, late = path(barrier), path(*[("FADD R1, R2, R3", Control(10))] * 5, barrier)
    # The early warp issues first, so the late one begins in cycle 1; both exit, one after the other.
    assert cycles(early, late) == 1 + 50 + constants.BARRIER + 1
    assert cycles(early) == constants.BARRIER  # alone in its block
    named = ("BAR.SYNC.DEFER_BLOCKING 0x1, 0x80", Control(1))  # of 128 threads, one warp of each sub-partition
    assert cycles(path(named), path(*[("FADD R1, R2, R3", Control(10))] * 5, named)) == 1 + 50 + constants.BARRIER


def test_a_barrier_that_nobody_else_reaches_is_an_error():
    with pytest.raises(RuntimeError, match=r"no warp can go on: blocks wait at barriers \[\(0, '0x0'\)\]"):
        cycles(path(("BAR.SYNC.DEFER_BLOCKING 0x0", Control(1))), path(FMA))


def test_wgmma_runs_while_other_instructions_issue_until_a_wait():
    """Four of 32 cycles each, from their start on; then the group's wait returns."""
    group = [("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24", Control(1))] * 3
    group += [("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0", Control(1))]
    done = constants.WGMMA_START + 4 * 32 + constants.WGMMA_DRAIN
    assert cycles(path(*group, (WAIT, Control(1)))) == done + 1
    independent = [("FFMA R1, R2, R3, R4", Control(1))] * 100
    assert cycles(path(*group, *independent, (WAIT, Control(1)))) == done + 1
    assert cycles(path(*group, *independent)) == 104  # without a wait
    assert cycles(path(*group, ("WARPGROUP.DEPBAR.LE gsb0, 0x1", Control(1)))) == 5  # one group may be pending


def test_two_warpgroups_share_the_tensor_core():
    group = ("HGMMA.64x128x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0", Control(1))
    one, two = path(*[group] * 10, (WAIT, Control(1))), constants.WGMMA_START + constants.WGMMA_DRAIN
    assert cycles(one) == two + 640 + 1
    assert cycles(one, one) == two + 1280 + 1


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("HGMMA.64x64x16.F32.BF16", "R24, R4, gdesc[UR4], R24", 32),
        ("HGMMA.64x64x16.F32.BF16", "R24, gdesc[UR4], R24", 32),  # (64 + 64) rows of 32 bytes, 128 bytes per cycle
        ("HGMMA.64x256x16.F32", "R24, gdesc[UR4], R24", 128),
        ("HGMMA.64x16x16.F32.BF16", "R24, gdesc[UR4], R24", 20),  # bound by its operands in shared memory
        ("HGMMA.64x64x8.F32.TF32", "R24, R4, gdesc[UR4], R24", 32),  # half of the FLOP in the same time
    ],
)
def test_the_tensor_core_is_bound_by_flop_or_by_shared_memory(opcode, operands, expected):
    (instruction,) = parse(f"/*0000*/ {opcode} {operands} ;")
    assert pipes.wgmma_cycles(instruction) == expected


def test_a_load_waits_for_latency_and_then_for_bandwidth():
    load, use = ("LDG.E.128 R4, desc[UR4][R2.64]", Control(1, result=0)), ("FADD R1, R4, R5", Control(1, waits=(0,)))
    per_byte = H200.clock * H200.sms * 4 / H200.copy_bandwidth
    first = 16 + 512 * per_byte + constants.DRAM_LATENCY
    assert cycles(path(load, use)) == pytest.approx(first + 1)
    assert cycles(path(*[load] * 50, use)) == pytest.approx(first + 49 * 512 * per_byte + 1)
    assert cycles(path(*[load] * 50, use), memory=Memory(H200, 0.0)) < 0.8 * cycles(path(*[load] * 50, use))  # from L2


def test_asynchronous_copies_are_counted_in_commits():
    copy = [("LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64]", Control(1)), ("LDGDEPBAR", Control(1))]
    memory = Memory(H200)
    first, second = (memory.load(start, 512) for start in (16, 32))
    one_pending = path(*copy, *copy, ("DEPBAR.LE SB0, 0x1", Control(1)))
    none_pending = path(*copy, *copy, ("DEPBAR.LE SB0, 0x0", Control(1)))
    assert cycles(one_pending) == pytest.approx(first + 1)
    assert cycles(none_pending) == pytest.approx(max(second, first) + 1, abs=2)


def test_a_free_slot_takes_the_next_block():
    chain = path(*[FMA] * 10)
    assert cycles(chain, slots=1, blocks=3) == 3 * 40 + 2 * constants.BLOCK_START
    assert cycles(chain, slots=2, blocks=3) == pytest.approx(2 * 40 + constants.BLOCK_START, abs=2)


def test_output_must_be_written_before_the_kernel_ends():
    store = ("STG.E.128 desc[UR4][R2.64], R4", Control(1))
    result = SubPartition([path(*[store] * 100)], 1, Memory(H200)).run(1)
    assert result.cycles >= 100 * 512 * H200.clock * H200.sms * 4 / H200.copy_bandwidth > result.ends[-1]


def test_loops_run_as_often_as_the_case_says():
    loop = ["ISETP P0, R1", "LDG R1, [R2]", "@P0 BRA 0x10", "EXIT"]
    assert names(loop, Choice({"memory": 3})).count("LDG") == 3
    assert names(loop, Choice()).count("LDG") == 1
    at_the_top = ["LDG R1, [R2]", "@!P0 BRA 0x40", "FADD R1, R2, R3", "BRA 0x0", "EXIT"]
    assert names(at_the_top, Choice({"memory": 3})).count("FADD") == 3
    nested = ["MOV R1, R2", "LDG R1, [R2]", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT"]
    assert names(nested, Choice({"memory": 2, "outer memory": 5})).count("LDG") == 10
    thrice = ["NOP", "MOV R1, R2", "LDG R1, [R2]", "@P0 BRA 0x20", "@P1 BRA 0x10", "@P2 BRA 0x0", "EXIT"]
    trips = {"memory": 2, "outer memory": 3, "outer outer memory": 4}
    assert names(thrice, Choice(trips)).count("LDG") == 24


def test_branches_follow_what_their_arms_contain():
    padding = ["@!P0 BRA 0x40", "STG [R2], R1", "@P1 BRA 0x10", "EXIT", "HGMMA.64x8x16.F32 R24, R4", "EXIT"]
    assert "HGMMA.64x8x16.F32" in names(padding, Choice({"memory": 0}))
    assert names(padding, Choice({"memory": 2})).count("STG") == 2
    tail = ["@!P0 BRA 0x40", "HGMMA.64x8x16.F32 R24, R4", "NOP", "NOP", "EXIT"]
    assert "HGMMA.64x8x16.F32" not in names(tail, Choice())  # an exception, which is skipped
    assert "HGMMA.64x8x16.F32" in names(tail, Choice(take=frozenset({"matmul"})))
    dropout = [
        "@!P0 BRA 0x30",
        "IMAD.HI.U32 R1, R2, 0xd2511f53, RZ",
        "BRA 0x50",
        "FADD R1, R2, R3",
        "FADD R1, R2, R3",
        "EXIT",
    ]
    assert "FADD" in names(dropout, Choice(avoid=frozenset({"dropout"})))
    assert "IMAD.HI.U32" in names(dropout, Choice(take=frozenset({"dropout"})))
    assert names(["@P0 EXIT", "@!P1 BRA 0x40", "FADD R1, R2, R3", "FADD R1, R2, R3", "EXIT"], Choice())[-1] == "EXIT"
    around = ["@!P0 BRA 0x50", "HGMMA.64x8x16.F32 R24, R4", "@!P1 BRA 0x40", dropout[1], "FADD R1, R2, R3", "EXIT"]
    taken = names(around, Choice(take=frozenset({"matmul"}), avoid=frozenset({"dropout"})))  # within the arm it takes
    assert taken == ["BRA", "HGMMA.64x8x16.F32", "BRA", "FADD", "EXIT"]


def test_a_wait_for_a_barrier_in_memory_succeeds_at_once():
    spin = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", "@!P0 BRA 0x0", "EXIT"]
    assert len(names(spin, Choice())) == 3


def test_an_unknown_instruction_is_an_error_that_says_where_to_add_it():
    with pytest.raises(ValueError, match=r"no unit is known for FOO\.BAR: add FOO to bench/sass_model/pipes\.py"):
        path(("FOO.BAR R1, R2", Control(1)))


@pytest.mark.parametrize(
    ("warps", "registers", "shared_memory", "barriers", "expected"),
    [
        (8, 106, 65_536, 1, 2),  # 4 warps of 112 x 32 registers per sub-partition
        (8, 128, 0, 1, 2),
        (8, 129, 0, 1, 1),
        (4, 32, 0, 1, 16),  # 64 warps
        (1, 32, 0, 0, 32),  # 32 blocks
        (4, 64, 75_000, 1, 3),  # shared memory
        (12, 168, 227 << 10, 2, 1),
        (1, 32, 0, 2, 32),  # 64 barriers
        (1, 32, 0, 3, 21),
        (3, 60, 0, 16, 4),
    ],
)
def test_occupancy(warps, registers, shared_memory, barriers, expected):
    assert occupancy.blocks_per_sm(warps, registers, shared_memory, barriers) == expected


@pytest.mark.parametrize(
    ("instructions", "expected"),
    [
        ([], 0),
        (["MEMBAR.ALL.CTA", "WARPGROUP.DEPBAR.LE gsb0, 0x0"], 0),
        (["BAR.SYNC.DEFER_BLOCKING 0x0"], 1),
        (["BAR.ARV 0x3, 0x40", "@P0 BAR.SYNC.DEFER_BLOCKING 0x1, 0x100"], 4),
        (["BAR.SYNC.DEFER_BLOCKING 0x0", "BAR.SYNC.DEFER_BLOCKING R5, 0x60"], 16),
    ],
)
def test_a_barrier_that_a_register_names_reserves_all_of_a_block(instructions, expected):
    lines = [f"/*{16 * i:04x}*/ {instruction} ;" for i, instruction in enumerate(instructions)]
    assert sass.barriers(sass.parse("\n".join(lines))) == expected


@pytest.mark.parametrize(("architecture", "allowed"), [("sm_90a", 2), ("sm_100", 2), ("sm_120", 1)])
def test_more_barriers_than_an_sm_full_of_blocks_has_are_excess(architecture, allowed):
    assert occupancy.excess_barriers(allowed, architecture) == []
    assert f"{allowed + 1} barriers per block" in occupancy.excess_barriers(allowed + 1, architecture)[0]


def test_a_block_that_does_not_fit_is_an_error():
    with pytest.raises(
        ValueError, match="no block fits on an SM because of its shared memory: 4 warps of 32 registers"
    ):
        occupancy.blocks_per_sm(4, 32, 228 << 10, 1)


def test_work_is_distributed_as_the_hardware_or_turns_do():
    costs = [4.0, 1.0, 1.0, 1.0, 1.0]
    assert schedule.dispatched(costs, 2) == 4
    assert schedule.dispatched(costs[::-1], 2) == 6  # the longest block starts last
    assert schedule.alternating(costs, 2) == 6  # 4 + 1 + 1, and 1 + 1
    assert schedule.alternating([4.0, 3.0, 2.0, 1.0], 2) == 5  # 4 + 1 and 3 + 2
    assert schedule.balance(costs, 4, 2) == 1
    assert schedule.alternating([], 2) == 0


def work(blocks: int, **changes) -> kernel_time.Work:
    values = {"choice": Choice(), "flop": 0.0, "reads": 0.0, "writes": 0.0, "loads": 0.0}
    return kernel_time.Work(blocks, **{**values, **changes})


def test_many_blocks_take_the_interval_between_their_ends():
    """Blocks of 40 cycles, 200 between them, one at a time (255 registers of 8 warps): 240 cycles each."""
    kernel = kernel_time.Kernel(listing([*[FMA] * 10, EXIT]), 4, 255, 200 << 10)
    short, long = (kernel_time.predict(kernel, work(132 * count), H200) for count in (3, 1000))
    assert short.seconds * H200.clock == pytest.approx(3 * 40 + 2 * 200)
    assert long.seconds * H200.clock == pytest.approx(1000 * 40 + 999 * 200, rel=1e-3)
    assert long.block_cycles == pytest.approx(240)
    assert long.bound.startswith("latency")


def test_a_copy_is_bound_by_memory():
    lines = [
        ("LDG.E.128 R4, desc[UR4][R2.64]", Control(1, result=0)),
        ("STG.E.128 desc[UR4][R2.64], R4", Control(1, waits=(0,))),
    ]
    kernel = kernel_time.Kernel(listing([*lines, EXIT]), 4, 32, 0)
    size = 100_000 * 4 * 512
    predicted = kernel_time.predict(kernel, work(100_000, reads=size, writes=size, loads=size), H200)
    assert predicted.seconds == pytest.approx(2 * size / H200.copy_bandwidth, rel=0.03)
    assert predicted.limit <= predicted.seconds
    assert predicted.bound.startswith("dram")


def test_blocks_of_three_warps_that_are_resident_together_run_together():
    """Five of them are 15 warps: a sub-partition has four or three of them at a time, and none waits for another."""
    chain = listing([*[("MUFU.EX2 R1, R1", Control(1, result=0, waits=(0,)))] * 10, EXIT])
    kernel = kernel_time.Kernel(chain, 3, 104, 0)
    one, all_resident = (kernel_time.predict(kernel, work(132 * count), H200) for count in (1, 5))
    assert all_resident.resident == 5
    assert all_resident.seconds < 1.5 * one.seconds


@pytest.mark.parametrize(("barrier", "resident"), [("0x1, 0x60", 10), ("R5, 0x60", 4)])
def test_barriers_limit_the_resident_blocks_of_a_kernel(barrier, resident):
    kernel = kernel_time.Kernel(listing([(f"BAR.SYNC.DEFER_BLOCKING {barrier}", Control(1)), EXIT]), 3, 60, 0)
    assert kernel_time.predict(kernel, work(132), H200).resident == resident


def test_a_path_with_too_few_matmuls_is_refused():
    kernel = kernel_time.Kernel(listing([("HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], R24", Control(1)), EXIT]), 4, 64, 0)
    flop = 132 * 2 * 64 * 64 * 16
    kernel_time.predict(kernel, work(132, flop=flop), H200)
    with pytest.raises(ValueError, match="took a wrong branch"):
        kernel_time.predict(kernel, work(132, flop=2 * flop), H200)


def test_blocks_of_mixed_lengths_are_dispatched_longest_first(monkeypatch):
    """A fake prediction: a block takes as many cycles as the sequences of its class are long, on one of two SMs."""
    predicted = []

    def fake(_kernel, of_length, _gpu):
        predicted.append(of_length.blocks)
        return kernel_time.Prediction(0.0, of_length.blocks, 1, 0.0, {})

    monkeypatch.setattr(mixed_lengths, "predict", fake)
    kernel, gpu = kernel_time.Kernel("", 4, 32, 0), replace(H200, sms=2)

    def cycles_of(*lengths: int, heads: int = 1) -> float:
        batch = mixed_lengths.Batch(lengths, heads, rows=128, step=64)
        return mixed_lengths.predict_mixed(kernel, work, batch, work(1), gpu).seconds * gpu.clock

    assert cycles_of(64, 128, 64) == pytest.approx(128)
    assert cycles_of(64, 128, 64, heads=3) == pytest.approx(384)
    assert cycles_of(256) == pytest.approx(256)  # two blocks of 128 rows, one on each SM
    predicted.clear()
    assert cycles_of(100, 120, 64) == pytest.approx(120 + 64)  # the longest of a class stands for it
    assert predicted == [120, 64]


def test_warps_of_different_roles_take_paths_of_their_own():
    """A block of eight warps, two on each sub-partition: one multiplies, the other exits or multiplies, too."""
    wgmma = ("HGMMA.64x128x16.F32 R24, R4, gdesc[UR4], R24, gsb0", Control(1))
    lines = [("@!P0 BRA 0x40", Control(1)), *[wgmma] * 2, (WAIT, Control(1)), EXIT]
    kernel = kernel_time.Kernel(listing(lines), 8, 240, 0)
    consumer, producer = Choice(take=frozenset({"matmul"})), Choice(avoid=frozenset({"matmul"}))
    flop = 132 * 2 * 2 * 64 * 128 * 16

    def cycles_of(*roles: Choice, flop: float = flop) -> float:
        return kernel_time.predict(kernel, work(132, roles=roles, flop=flop), H200).seconds * H200.clock

    overhead = 1 + constants.WGMMA_START + constants.WGMMA_DRAIN + 1
    assert cycles_of(consumer, producer) == pytest.approx(overhead + 2 * 64, abs=3)
    assert cycles_of(consumer, consumer) == pytest.approx(overhead + 4 * 64, abs=3)
    with pytest.raises(ValueError, match="took a wrong branch"):
        cycles_of(consumer, producer, flop=2 * flop)


def test_loads_outside_of_a_warps_path_bound_the_time():
    """Loads by TMA: the kernel's warps do nothing, and memory is busy."""
    kernel = kernel_time.Kernel(listing([FMA, EXIT]), 4, 32, 0)
    predicted = kernel_time.predict(kernel, work(132, reads=1e9), H200)
    assert predicted.seconds == pytest.approx(1e9 / H200.copy_bandwidth)
    assert predicted.bound == "dram 100%"


def test_persistent_blocks_take_turns_at_the_longest_sequences_first(monkeypatch):
    """A fake prediction: a work tile takes as many cycles as its sequence is long; two SMs, one head."""
    monkeypatch.setattr(
        mixed_lengths,
        "predict",
        lambda _kernel, of_length, _gpu: kernel_time.Prediction(0.0, 3.0 * of_length.blocks, 1, 0.0, {}),
    )
    kernel, gpu = kernel_time.Kernel("", 12, 168, 0), replace(H200, sms=2)

    def predicted(*lengths: int) -> kernel_time.Prediction:
        batch = mixed_lengths.Batch(lengths, 1, rows=128, step=128)
        return mixed_lengths.predict_persistent(kernel, lambda length: work(length, tiles=3), batch, work(1), gpu)

    assert predicted(512, 128, 512, 128).seconds * gpu.clock == pytest.approx(640)
    assert predicted(128, 256, 384, 512).seconds * gpu.clock == pytest.approx(640)  # 512 + 128, and 384 + 256
    assert predicted(512, 128, 128).bound.endswith("balance of SMs 75%")


def test_code_outside_of_loops_with_matmuls_can_take_another_path():
    """A loop and an iteration after it, both of which can be masked."""
    mask = ["ISETP.GE.AND P2, PT, R1, R2, PT"] * 16
    loop = ["HGMMA.64x8x16.F32 R24, R4", "@P0 BRA 0x120", *mask, "@P1 BRA 0x0"]
    lines = [*loop, "HGMMA.64x8x16.F32 R24, R4", "@P0 BRA 0x250", *mask, "EXIT"]
    plain = Choice({"matmul": 3}, avoid=frozenset({"mask"}))
    masked = replace(plain, outside=Choice({"matmul": 3}, take=frozenset({"mask"})))
    assert [names(lines, choice).count("ISETP.GE.AND") for choice in (plain, masked)] == [0, 16]
    assert names(lines, masked).count("HGMMA.64x8x16.F32") == 4
