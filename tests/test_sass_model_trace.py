"""`bench.sass_model.trace` records what code would launch on a GPU, without computing anything."""

import os

import launches
import pytest
import torch

from bench.sass_model import targets, training_cases, workloads
from bench.sass_model.trace import Call, recording
from bertfast import ops

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets")


def recorded(function, *shapes) -> list[Call]:
    with recording() as calls:
        tensors = [torch.empty(shape) for shape in shapes]
        calls.clear()
        function(*tensors)
    return calls


def traffic(calls: list[Call]) -> list[tuple[str, int, int]]:
    return [(call.name, call.reads, call.writes) for call in calls]


def test_an_operator_reads_its_inputs_and_writes_its_result():
    assert traffic(recorded(lambda x, y: x + y, (4, 8), (8,))) == [("add", 128 + 32, 128)]
    assert traffic(recorded(lambda x: x.add_(1), (4, 8))) == [("add_", 128, 128)]


def test_views_and_new_memory_are_free():
    assert recorded(lambda x: torch.empty_like(x[1:].reshape(-1).t()), (4, 8)) == []


def test_a_repeated_row_is_read_once():
    assert traffic(recorded(lambda x: x.expand(4, 8) * 2, (8,))) == [("mul", 32, 128)]


def test_what_is_overwritten_is_not_read():
    assert traffic(recorded(lambda x: x.zero_(), (4, 8))) == [("zero_", 0, 128)]
    assert traffic(recorded(lambda x, y: x.copy_(y), (4, 8), (8,))) == [("copy_", 32, 128)]
    assert traffic(recorded(lambda x, y: torch.add(x, 1, out=y), (8,), (8,))) == [("add", 32, 32)]


def test_a_gather_reads_the_rows_that_it_writes():
    def gather(x):
        return x.index_select(0, torch.empty(2, dtype=torch.int64))

    assert traffic(recorded(gather, (100, 8))) == [("index_select", 16 + 64, 64)]


def test_a_gemm_has_its_shape():
    (call,) = recorded(lambda x, y: x @ y, (4, 8), (8, 3))
    assert (call.name, call.gemm, call.is_kernel) == ("mm", (4, 3, 8), False)


def test_kernels_of_an_operator_are_recorded_with_what_it_calls():
    def loss(x, weight):
        labels = torch.empty(6, dtype=torch.int64)
        return ops.linear_cross_entropy(x.requires_grad_(), None, weight, weight[:, 0], labels)

    calls = recorded(loss, (6, 8), (100, 8))
    assert [call.name for call in calls if call.is_kernel] == ["cross_entropy", "cross_entropy_gradient"]
    assert {call.operator for call in calls if call.gemm} == {"linear_cross_entropy_forward"}
    (kernel,) = (call for call in calls if call.name == "cross_entropy")
    assert (kernel.blocks, kernel.rows, kernel.element) == (6, 6, 4)


def test_an_unknown_option_of_a_launch_is_an_error():
    """The interpreter ignores it, and only a GPU would find it."""
    x = torch.empty(16)
    with recording() as calls, pytest.raises(TypeError, match="unexpected keyword argument 'WIDTH'"):
        launches.attention_like_kernel[(1,)](x, BLOCK=4, WIDTH=4, num_warps=4)
    assert calls == []


def test_nothing_pretends_to_be_on_a_gpu_afterwards():
    with recording():
        assert torch.empty(1).is_cuda
    assert not torch.empty(1).is_cuda
    assert torch.ones(2).sum() == 2


@pytest.mark.slow
def test_workloads_have_the_names_of_their_targets():
    rows = {(workload.name, f"{workload.case}, Triton") for workload in workloads.workloads()}
    expected = [(one.kernel, one.case) for one in targets.TARGETS if one.case.endswith("Triton")]
    assert len(expected) == 5
    assert [row for row in expected if row not in rows] == []


def gemm_flop(calls: list[Call]) -> int:
    return sum(2 * call.gemm[0] * call.gemm[1] * call.gemm[2] for call in calls if call.gemm)


def test_each_layer_of_a_step_runs_its_kernels_and_gemms():
    tokens, hidden = 512, 768
    two, three = (workloads.training_step(128, tokens, None, layers)[0] for layers in (2, 3))
    parameters = hidden * (4 * hidden + 2 * 4 * hidden)
    assert gemm_flop(three) - gemm_flop(two) == 6 * parameters * tokens
    names = [call.name for call in three if call.is_kernel]
    assert (names.count("attention_forward"), names.count("attention_backward_short")) == (3, 3)
    assert (names.count("add_layer_norm_forward"), names.count("bias_gelu_backward")) == (6, 3)
    assert (names.count("gelu_layer_norm_forward"), names.count("embeddings_backward")) == (1, 1)


def test_a_step_updates_every_trained_parameter_once():
    calls, _ = workloads.training_step(128, 256, None, layers=1)
    updated = sum(call.writes for call in calls if call.name == "_fused_adamw_")
    parameters = 768 * (30_522 + 512 + 2 + 4 * 768 + 8 * 768 + 768) + 30_522 + 768 * (2 + 4 + 4 + 1 + 4 + 3)
    assert updated == 4 * 4 * parameters  # weight, gradient and two moments
    cleared = [(call.reads, call.writes) for call in calls if call.name == "_foreach_zero_"]
    assert cleared == [(0, 4 * parameters)]  # one operator, and not one per parameter


def test_the_case_of_the_loss_is_its_first_chunk():
    calls = workloads._linear_cross_entropy()
    loss, gradient = (next(call for call in calls if call.name == f"cross_entropy{end}") for end in ("", "_gradient"))
    assert loss.rows == training_cases.CHUNK_ROWS
    assert gradient.blocks == training_cases._GRADIENT_PROGRAMS
