"""`bench.sass_model.compiled_cuda` fails if required kernels are missing, and reads what cuobjdump prints."""

import sys

import pytest

from bench.sass_model import compiled_cuda
from bertfast.ops import cuda_build, native
from bertfast.ops.cuda_build import CudaBuild

BUILD = CudaBuild(nvcc="13.0.88", reason=None, architectures={"attention": ["90a"]}, missing={}, slow={})
WITHOUT_NVCC = CudaBuild(nvcc=None, reason="NVCC is empty", architectures={}, missing={}, slow={})
RESOURCES = """
Fatbin elf code:
arch = sm_90a
 Function _Z14attention_likev:
  REG:168 STACK:0 SHARED:0 LOCAL:{spilled} CONSTANT[0]:528 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
arch = sm_90a
        Function : _Z14attention_likev
        /*0000*/                   UTMALDG.3D [UR8], [UR4] ;    /* 0x0 */
        /*0010*/                   HGMMA.64x16x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;    /* 0x0 */
        /*0020*/                   {first} ;    /* 0x0 */
        /*0030*/                   {second} ;    /* 0x0 */
        /*0040*/                   EXIT ;    /* 0x0 */
"""
WAIT, READ = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "FADD R50, R31, R51"


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Run the program on what cuobjdump printed; return its status and its errors."""

    def program(*options, build=BUILD, spilled=0, code=(WAIT, READ)):
        printed = {
            "--dump-resource-usage": RESOURCES.format(spilled=spilled),
            "--dump-sass": SASS.format(first=code[0], second=code[1]),
        }
        monkeypatch.setattr(native, "UNAVAILABLE_REASON", None)
        monkeypatch.setattr(cuda_build, "BUILD", build)
        monkeypatch.setattr(cuda_build, "_FOUND", (build, tmp_path / "_C.cuda.json"))
        monkeypatch.setattr(compiled_cuda, "cuobjdump", lambda option, _file=None: printed[option].splitlines())
        monkeypatch.setattr(sys, "argv", ["compiled_cuda", "--output", str(tmp_path / "table.md"), *options])
        return compiled_cuda.main(), capsys.readouterr().err

    return program


def test_missing_kernels_are_a_fault_only_if_they_are_required(run, tmp_path):
    status, errors = run(build=WITHOUT_NVCC)
    assert status == 0
    assert "nothing to check: not built: NVCC is empty" in errors
    status, errors = run("--required", build=WITHOUT_NVCC)
    assert status == 1
    assert "no CUDA C++ kernels, which --required demands (not built: NVCC is empty): build them with `NVCC=" in errors
    assert len(errors.splitlines()) == 1
    assert not (tmp_path / "table.md").exists()


def test_the_table_has_registers_and_hoppers_instructions(run, tmp_path):
    status, errors = run("--required")
    assert (status, errors.strip()) == (0, "")
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| kernel | sm_90a | HGMMA | UTMALDG |",
        "|---|---|---|---|",
        "| attention_like | 168 | 1 | 1 |",
    ]


def test_a_hazard_of_a_pending_wgmma_is_a_fault(run):
    status, errors = run(code=(READ, WAIT))
    assert status == 1
    assert "attention_like on sm_90a: FADD reads the accumulator of the wgmma at 0x10 at 0x20" in errors


@pytest.mark.parametrize(("barrier", "reserved"), [("0x1", 2), ("0x2", 3), ("R5", 16)])
def test_barriers_that_limit_the_blocks_of_an_sm_are_a_fault(run, barrier, reserved):
    status, errors = run(code=(WAIT, f"BAR.SYNC.DEFER_BLOCKING {barrier}, 0x60"))
    assert status == (reserved > 2)
    assert (f"attention_like on sm_90a: {reserved} barriers per block" in errors) == (reserved > 2)


def test_a_spill_is_a_fault(run):
    status, errors = run(spilled=8)
    assert status == 1
    assert "spills 8 bytes" in errors
