"""`bertfast doctor` tells what is so, and its self-test finds kernels that are wrong."""

import json
import sys

import pytest
import torch

from bertfast import ops
from bertfast.cli import self_test
from bertfast.cli.main import main
from bertfast.ops import native
from bertfast.ops.attention import HEAD_DIMENSIONS

needs_library = pytest.mark.skipif(native.ABSENT is not None, reason=str(native.ABSENT))


@pytest.fixture
def told(capsys, monkeypatch):
    """Call it for what the command prints: its facts by name, and the lines that follow them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def run() -> tuple[dict[str, str], list[str]]:
        assert main(["doctor", "--device", "cpu"]) == 0
        facts, _, table = capsys.readouterr().out.partition("\n\n")
        return dict(line.split(maxsplit=1) for line in facts.splitlines()), table.splitlines()

    return run


@needs_library
def test_names_the_library_and_what_runs_each_operation(told):
    facts, table = told()
    assert torch.__version__ in facts["versions"]
    assert facts["library"].startswith(f"{native.path()}; instruction sets plain")
    assert facts["library"].endswith(f"{native.instruction_set()} in use")
    assert facts["training"].startswith("on cpu in ")
    assert [line.split() for line in table[1 : len(ops.__all__) + 1]] == [[name, "cpu", "cpu"] for name in ops.__all__]


def test_says_why_there_are_no_kernels(told, monkeypatch):
    monkeypatch.setattr(native, "ABSENT", "the compiled library was not built")
    facts, table = told()
    assert facts["library"] == "none: the compiled library was not built"
    assert table[1].split() == [ops.__all__[0], "reference", "reference"]
    because = "reference, which is plain PyTorch: the compiled library was not built"
    assert f"cpu fp32: {because}" in table
    assert f"cpu bf16: {because}" in table
    assert table[-3:] == [
        "Faster would be:",
        "  the compiled library: install bertfast again where a C++ compiler is",
        "  a GPU of sm_80 or later",
    ]


def test_a_device_that_is_not_here_is_one_sentence(capsys):
    assert main(["doctor", "--device", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("bertfast doctor: device 'nonsense' is not ")


CHECK = ["doctor", "--check", "--device", "cpu"]


@pytest.fixture
def two_problems(monkeypatch):
    """A self-test of two operators, which takes no time."""
    everything = self_test.problems

    def some(device):
        return [problem for problem in everything(device) if problem.operator in ("bias_gelu", "gelu_layer_norm")]

    monkeypatch.setattr(self_test, "problems", some)


def plant(monkeypatch, kernel):
    """Let `kernel` run in place of every forward kernel of bias_gelu."""
    module = sys.modules["bertfast.ops.bias_gelu"]
    original = module.launcher
    monkeypatch.setattr(module, "launcher", lambda *of: kernel if of[1].endswith("forward") else original(*of))


def test_every_operator_is_checked_with_every_head_dimension():
    problems = self_test.problems(torch.device("cpu"))
    assert {problem.operator for problem in problems} == set(ops.__all__)
    attention = [problem.shape for problem in problems if problem.operator == "attention"]
    for dimension in HEAD_DIMENSIONS:
        for length in ("2x128", "1x512"):
            assert {f"{length} D={dimension}", f"{length} D={dimension} dropout"} <= set(attention)


def test_right_kernels_pass(two_problems, capsys):
    assert main(CHECK) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    rows = [line for line in out.splitlines() if line.startswith(("bias_gelu", "gelu_layer_norm"))]
    assert all(row.endswith("  passed") for row in rows)
    assert {row.split()[1] for row in rows} == {"reference"} | ({"cpu"} if native.ABSENT is None else set())
    assert f"{len(rows)} of {len(rows)} checks passed, 0 were not reached." in out


@pytest.mark.parametrize("precision", self_test.PRECISIONS)
def test_a_copy_for_the_next_gemm_passes_in_every_precision(precision, capsys):
    assert main([*CHECK, "--only", "add_layer_norm", "copy", precision]) == 0
    assert "  passed" in capsys.readouterr().out


@needs_library
def test_an_output_is_held_to_its_own_precision_beside_a_coarser_copy(monkeypatch, capsys):
    """An fp32 output that is as inexact as its bf16 copy is wrong."""
    module = sys.modules["bertfast.ops.add_layer_norm"]
    original = module.launcher

    def inexact(*arguments):
        y, *rest = original("cpu", "add_layer_norm_forward")(*arguments)
        return y.bfloat16().to(y.dtype), *rest

    monkeypatch.setattr(module, "launcher", lambda *of: inexact if of[1].endswith("forward") else original(*of))
    assert main([*CHECK, "--only", "add_layer_norm", "copy", "cpu", "fp32"]) == 1
    assert "FAILED: output" in capsys.readouterr().out


@needs_library
def test_a_wrong_kernel_fails_and_is_named(two_problems, monkeypatch, capsys):
    plant(monkeypatch, lambda x, bias, approximate: ops.bias_gelu(x, bias, implementation="reference") * 1.02)
    assert main(CHECK) == 1
    out = capsys.readouterr().out
    assert "FAILED: output" in next(line for line in out.splitlines() if line.startswith("bias_gelu            cpu"))
    assert "bias_gelu cpu fp32 1x512 H=3072 on cpu: failed: output" in out
    assert "gelu_layer_norm cpu fp32 77 H=768 on cpu: " not in out  # the others pass


@needs_library
def test_nan_of_a_kernel_fails(two_problems, monkeypatch, capsys):
    plant(monkeypatch, lambda x, bias, approximate: torch.full_like(x, torch.nan))
    assert main([*CHECK, "--only", "bias_gelu", "cpu", "fp32"]) == 1
    assert "FAILED: output" in capsys.readouterr().out


@needs_library
def test_an_exception_in_a_kernel_is_reported_and_the_rest_goes_on(two_problems, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no such instruction\nat line 3")

    plant(monkeypatch, broken)
    assert main([*CHECK, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    broken_ones = [check for check in checks if check["status"] == "error"]
    assert {(check["operator"], check["implementation"]) for check in broken_ones} == {("bias_gelu", "cpu")}
    assert broken_ones[0]["message"] == "RuntimeError: no such instruction"
    assert {check["status"] for check in checks if check not in broken_ones} == {"passed"}


def test_checks_beyond_the_time_are_listed_as_not_reached(two_problems, capsys):
    assert main([*CHECK, "--seconds", "0.000001"]) == 0
    out = capsys.readouterr().out
    assert "NOT REACHED: the time of 0 s is over" in out
    assert "\n0 of " in out
    assert " 0 were not reached" not in out


@needs_library
def test_a_cuda_error_ends_the_self_test(two_problems, monkeypatch):
    """After an illegal access every call fails; checks of this process then say nothing about their kernels."""

    def broken(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    plant(monkeypatch, broken)
    monkeypatch.setattr(self_test, "_is_poisoned", lambda device: True)
    outcomes = [*self_test.run([torch.device("cpu")], (), 60)]
    statuses = [outcome.status for outcome in outcomes]
    first = statuses.index("error")
    assert outcomes[first].operator == "bias_gelu"
    assert set(statuses[first + 1 :]) == {"not reached"}
    assert "CUDA error" in outcomes[-1].message


def test_words_that_no_check_has_are_one_sentence(two_problems, capsys):
    assert main([*CHECK, "--only", "nonsense"]) == 1
    assert "no check has all words of --only nonsense: run without --only" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_no_time_for_checks_is_refused(seconds, capsys):
    assert main(["doctor", "--check", "--seconds", seconds]) == 1
    assert f"--seconds must be positive, got {seconds}" in capsys.readouterr().err
