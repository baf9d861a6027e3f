"""`bench.sass_model` reads nvcc's kernels, keeps machine code for later, and predicts persistent kernels with TMA."""

import re
from pathlib import Path

import pytest
from sass_listings import EXIT, listing

from bench.sass_model import (
    compiled_cuda,
    constants,
    control_words,
    cuda_cases,
    cuda_training_cases,
    history,
    kernel_time,
    machine_code,
)
from bench.sass_model import predict as predict_program
from bench.sass_model.constants import H200
from bench.sass_model.control_flow import Choice, ControlFlow
from bench.sass_model.control_words import Control
from bench.sass_model.machine_code import Code
from bench.sass_model.sass import parse

CSRC = Path(__file__).parents[1] / "csrc" / "cuda"
CODE = listing([("@!P0 FADD R1, R2, R3", Control(4, 1, None, (2,))), ("UIADD3 UR4, UR5, 0x1, URZ", Control(1)), EXIT])
DELTA = "_ZN8bertfast4cuda12delta_kernelINS_8BFloat16ELi64EEEvNS_17AttentionBackwardE"
RESOURCES = " Function {name}:\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0"


@pytest.mark.parametrize("architecture", ["arch = sm_90", "\tcode for sm_90a"])
def test_kernels_are_read_from_libraries_and_cubins(monkeypatch, tmp_path, architecture):
    library = architecture.startswith("arch")
    resources = f"{architecture if library else ''}\n{RESOURCES.format(name=DELTA)}"
    other = resources.replace("sm_90", "sm_80").replace("REG:40", "REG:99") if library else ""
    sass = f"{architecture}\n\t\tFunction : {DELTA}\n{CODE}\n"
    printed = {"--dump-resource-usage": other + resources, "--dump-sass": sass.replace("sm_90", "sm_80") + sass}
    monkeypatch.setattr(compiled_cuda, "cuobjdump", lambda option, _file: printed[option].splitlines())
    (code,) = machine_code.read_cuda(tmp_path / "_C.abi3.so")
    assert code.kernel == "delta_kernel<BFloat16, 64>"
    assert code.registers == 40
    assert control_words.parse(code.listing) == control_words.parse(CODE)
    monkeypatch.setattr(compiled_cuda, "cuobjdump", lambda _option, _file: [])
    with pytest.raises(ValueError, match=r"has no kernel for sm_90: build it with `NVCC="):
        machine_code.read_cuda(tmp_path / "_C.abi3.so")


def test_kept_machine_code_is_what_the_model_reads(tmp_path):
    kept = [Code("rotary", CODE, 64, "rotary", 4, 128, {"ROWS": 64}), Code("delta_kernel<BFloat16, 64>", CODE, 40)]
    path = tmp_path / "kept.json.xz"
    path.write_bytes(machine_code.pack(kept, {"nvcc": "13.0.88", "sources": "0123"}))
    triton, cuda = machine_code.unpack(path.read_bytes())
    assert control_words.parse(triton.listing) == control_words.parse(CODE)
    assert (triton.launch, triton.warps, triton.shared_memory, triton.options) == ("rotary", 4, 128, {"ROWS": 64})
    assert machine_code.read_cuda(path) == [cuda]
    assert machine_code.nvcc_version(path) == "13.0.88"
    assert machine_code.nvcc_version(tmp_path / "lone.cubin") == "unknown"
    assert machine_code.kept_sources_hash(path) == "0123"
    assert machine_code.kept_sources_hash(tmp_path / "lone.cubin") == machine_code.sources_hash()


def test_changed_sources_have_another_hash_and_changed_comments_do_not(tmp_path):
    file = tmp_path / "rows.cuh"
    hashes = []
    for text in ("int a = 1;  // one\n", "int a =\n  1;  // another comment\n", "int a = 2;  // one\n"):
        file.write_text(text)
        hashes.append(machine_code.sources_hash(tmp_path))
    assert hashes[0] == hashes[1] != hashes[2]


def test_kernels_without_a_row_are_named():
    names = predict_program.absent_kernels([])
    assert "delta_kernel<BFloat16, 64>" in names
    assert "loss_kernel<BFloat16, true>" in names
    assert "delta_kernel<BFloat16, 64>" not in predict_program.absent_kernels(
        [row("delta_kernel<BFloat16, 64>", 1e-6, True)]
    )


def test_a_mask_is_avoided_if_a_path_leads_around_it():
    """Two conditions, each of which leads to 16 comparisons: the shorter arm of both is that of the mask."""
    compare = ["ISETP.GE.AND P2, PT, R1, R2, PT"] * 16
    lines = ["@P0 BRA 0x50", "@P1 BRA 0x50", "FADD R1, R2, R3", "FADD R1, R2, R3", "BRA 0x150", *compare, "EXIT"]
    flow = ControlFlow(parse(listing([(line, Control(1)) for line in lines])))

    def opcodes(choice: Choice) -> list[str]:
        return [flow.instructions[index].opcode for index in flow.path(choice)]

    assert opcodes(Choice(avoid=frozenset({"mask"}))) == ["BRA", "BRA", "FADD", "FADD", "BRA", "EXIT"]
    assert opcodes(Choice(take=frozenset({"mask"})))[-2:] == ["ISETP.GE.AND", "EXIT"]


def test_an_arm_with_what_a_case_never_does_is_not_taken_for_its_loads():
    """A load that half a branch converts from fp16; then the same in a loop that runs, whose other half is taken."""
    arm = ["LDG.E R4, desc[UR4][R2.64]", "@P1 BRA 0x50", "HADD2.F32 R4, -RZ, R4.H0_H0", "FADD R1, R2, R4"]
    flow = ControlFlow(parse(listing([(line, Control(1)) for line in ["@P0 BRA 0x50", *arm, "EXIT"]])))
    take, never = frozenset({"load"}), frozenset({"half"})
    assert len(flow.path(Choice(take=take))) > 2
    assert [flow.instructions[index].opcode for index in flow.path(Choice(take=take, never=never))] == ["BRA", "EXIT"]
    looped = ControlFlow(parse(listing([(line, Control(1)) for line in [*arm, "@P2 BRA 0x0", "EXIT"]])))
    opcodes = [looped.instructions[index].opcode for index in looped.path(Choice({"memory": 2}, take, never=never))]
    assert opcodes.count("LDG.E") == 2


def test_a_loop_around_matmuls_that_never_runs_is_skipped():
    """The branch that decides is in front of a loop that tests at its end."""
    lines = [
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
        "@P0 BRA 0x40",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    ]
    flow = ControlFlow(parse(listing([(line, Control(1)) for line in [*lines, "@P1 BRA 0x20", "EXIT"]])))
    executed = [len(flow.path(Choice({"matmul": trips}, frozenset({"matmul"})))) for trips in (0, 1, 2)]
    assert executed == [3, 5, 7]


def work(**changes) -> kernel_time.Work:
    values = {"choice": Choice(), "flop": 0.0, "reads": 0.0, "writes": 0.0, "loads": 0.0}
    return kernel_time.Work(132, **{**values, **changes})


def test_waits_for_tma_and_the_bandwidth_of_l2_take_time():
    kernel = kernel_time.Kernel(listing([("FFMA R1, R1, R2, R3", Control(4))] * 10 + [EXIT]), 4, 32, 0)

    def cycles(**changes) -> float:
        return kernel_time.predict(kernel, work(**changes), H200).seconds * H200.clock

    assert cycles() == pytest.approx(40)
    each = constants.DRAM_LATENCY + 27_000 / constants.L2_BYTES
    assert cycles(waits=3, awaited=27_000) == pytest.approx(40 + 3 * each)
    assert cycles(loads=132 * 27_000) == pytest.approx(27_000 / constants.L2_BYTES)


def row(kernel: str, seconds: float, cuda: bool) -> predict_program.Row:
    prediction = kernel_time.Prediction(seconds, 1.0, 1, seconds, {"dram": 1.0})
    return predict_program.Row(kernel, "length 512", "8 warps", 64, work(), prediction, 1e9, cuda)


def test_the_kernels_of_a_pass_are_added_by_language():
    found = [row("d_q", 1e-6, False), row("d_kv", 2e-6, False), row("delta", 1e-6, True)]
    found += [row("keys", 2e-6, True), row("queries", 3e-6, True)]
    sums = [line for line in predict_program.table(found) if "kernels" in line]
    assert [line.split("|")[1].strip() for line in sums] == ["both kernels", "all kernels, CUDA C++"]
    assert "| 3.0 | 333 |" in sums[0]
    assert "| 6.0 | 167 |" in sums[1]


def test_constants_of_the_cases_are_those_of_the_kernels():
    def number(file: str, pattern: str) -> int:
        found = re.search(pattern, (CSRC / file).read_text(encoding="utf-8"))
        assert found is not None, f"{file} has no {pattern}"
        return int(found[1])

    threads = 3 * 32  # of a team at 768 columns
    for name, blocks in cuda_cases.ROW_BLOCKS_PER_SM.items():
        pattern = rf"{name.upper()}_BLOCKS_PER_SM = COUNT == 1 \? (\d+) / BLOCK"
        assert number("rows.cuh", pattern) // threads == blocks
    for name, blocks in cuda_cases.GELU_BLOCKS_PER_SM.items():
        assert number("bias_gelu.cu", rf"{name.upper()}_BLOCKS_PER_SM = (\d+)") == blocks
    assert number("bias_gelu.cu", r"MAX_ROWS_IN_FLIGHT = (\d+)") == cuda_cases.GELU_ROWS
    assert number("bias_gelu.cu", r"GELU_THREADS = (\d+)") * 8 == cuda_cases.GELU_COLUMNS
    loss = cuda_training_cases
    assert number("cross_entropy.cu", r"LOSS_THREADS = (\d+)") == 32 * loss.LOSS_WARPS
    assert number("cross_entropy.cu", r"GRADIENT_WARPS = (\d+)") == loss.GRADIENT_WARPS
    assert number("cross_entropy.cu", r"GRADIENT_COLUMNS = 32 \* (\d+)") * 32 == loss.GRADIENT_COLUMNS
    assert number("cross_entropy.cu", r"UNROLL_(\d)_FOR") == loss._UNROLLED
    assert number("work_tiles.cuh", r"ATTENTION_THREADS = (\d+)") == 32 * cuda_cases.ATTENTION_WARPS
    assert number("work_tiles.cuh", r"BLOCK = (\d+)") == cuda_cases.BLOCK
    prefetched = number("attention_keys.cuh", r"MAX_PREFETCHED_SEQLEN = D == 64 \? (\d+)")
    names = [case.kernel for case in cuda_cases.cuda_cases() if case.case == "length 128"]
    assert f"attention_keys_kernel<BFloat16, 64, {prefetched}>" in names


def test_the_page_has_every_case_of_cuda():
    page = predict_program.PAGE.read_text(encoding="utf-8")
    missing = [case.kernel for case in cuda_cases.cuda_cases() if f"| {case.kernel} | {case.case} |" not in page]
    assert missing == []


def test_the_history_has_what_changed():
    times = {"aaa": {"rotary, x": 1.0, "delta, y": 2.0}, "bbb": {"rotary, x": 1.0, "delta, y": 1.0}}
    lines = history.table(times)
    assert lines[-1] == "| delta, y | 2.0 | 1.0 |"
    assert not any("rotary" in line for line in lines)
    assert history.table({"aaa": {}, "bbb": {"rotary, x": 1.0}})[-1] == "| rotary, x |  | 1.0 |"


def test_the_history_reads_the_table_of_predictions():
    table = predict_program.table([row("d_q", 1e-6, False), row("d_kv", 2e-6, False)])
    assert history.microseconds(table) == {
        "d_q, length 512": 1.0,
        "d_kv, length 512": 2.0,
        "both kernels, length 512": 3.0,
    }
