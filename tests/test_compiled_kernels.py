"""`bench.sass_model.compiled_kernels` finds faults of compiled kernels, and batches of all sizes share kernels."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import launches
import pytest
from launches import in_a_process

from bench.sass_model import ahead_of_time

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets"),
]


def compiled(size: int = 64, **options) -> ahead_of_time.Compiled:
    (row,) = in_a_process(launches.compile_attention_like, size, options)
    return row


def test_a_correct_kernel_has_no_faults():
    row = compiled()
    assert row.tensor_core == "HGMMA"
    assert row.faults() == []


def test_a_spill_is_a_fault():
    row = compiled(size=128, num_warps=1)
    assert "instructions spill registers" in row.faults()[0]


def test_serialised_wgmma_are_a_fault_and_other_warnings_are_not():
    """Tested on messages of ptxas, because its heuristics decide which kernels are serialised."""
    log = "ptxas info    : ({}) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {}"
    serialised = log.format("C7515", "ill formed pipeline stage in the function") + "\n" + log.format("C7510", "a call")
    assert ahead_of_time.serialised_wgmma(serialised) == ["C7510", "C7515"]
    assert ahead_of_time.serialised_wgmma("ptxas info    : (C7519) Potential Performance Loss: a wait") == []
    row = replace(compiled(), serialised=["C7515"])
    assert row.faults() == ["ptxas serialises its wgmma (C7515)"]


def test_too_much_shared_memory_wrong_tensor_cores_hazards_and_barriers_are_faults():
    row = compiled()
    assert 1 <= row.barriers <= 2
    assert "16 barriers per block" in replace(row, barriers=16).faults()[0]
    assert "more than the GPU's 227 KiB" in replace(row, shared_memory=300 << 10).faults()[0]
    assert replace(row, tensor_core="HMMA").faults() == ["its matmuls run on HMMA"]
    assert replace(row, tensor_core="").faults() == ["its matmuls run on no tensor core"]
    assert replace(row, hazards=["FADD reads the accumulator"]).faults() == ["FADD reads the accumulator"]


def test_batches_of_all_sizes_share_kernels():
    """A dropout threshold of 1, of which Triton could make a constant, needs no kernel of its own either."""
    kernels = in_a_process(launches.compile_batches)
    counts = Counter(row.kernel for row in kernels)
    assert set(counts.values()) == {1}, counts
    assert len(counts) == 8  # attention has four, the two others two each


def test_an_unknown_architecture_is_rejected():
    ran = subprocess.run(
        [sys.executable, "-m", "bench.sass_model.compiled_kernels", "--architectures", "75"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "invalid choice: 75" in ran.stderr
