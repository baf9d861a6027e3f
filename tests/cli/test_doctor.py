"""`bertfast doctor` reports the machine as it is, and its self-test finds incorrect kernels."""

import importlib.metadata
import json
import sys

import pytest
import torch

import bertfast
from bertfast import ops
from bertfast.cli import self_test
from bertfast.cli.doctor import DoctorSettings
from bertfast.cli.main import main
from bertfast.cli.self_test_problems import MIXED, PADDING_SLOTS
from bertfast.ops import cuda_build, native
from bertfast.ops.attention import HEAD_DIMENSIONS

needs_library = pytest.mark.skipif(native.UNAVAILABLE_REASON is not None, reason=str(native.UNAVAILABLE_REASON))


@pytest.fixture
def report(capsys, monkeypatch):
    """Return a function that runs the command and returns its facts by name and the lines after them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def run() -> tuple[dict[str, str], list[str]]:
        assert main(["doctor", "--device", "cpu"]) == 0
        facts, _, table = capsys.readouterr().out.partition("\n\n")
        return dict(line.split(maxsplit=1) for line in facts.splitlines()), table.splitlines()

    return run


@needs_library
def test_the_report_names_the_library_and_the_implementation_of_each_operator(report):
    facts, table = report()
    assert torch.__version__ in facts["versions"]
    assert facts["library"].startswith(f"{native.path()}; instruction sets plain")
    assert f"; {native.instruction_set()} in use, " in facts["library"]
    assert facts["training"].startswith("on cpu in ")
    assert [line.split() for line in table[1 : len(ops.__all__) + 1]] == [[name, "cpu", "cpu"] for name in ops.__all__]


@needs_library
@pytest.mark.parametrize(
    ("tiles", "quads", "text"),
    [
        (False, False, "int8 without dot products"),
        (False, True, "int8 with VNNI"),
        (True, False, "int8 with AMX"),
        (True, True, "int8 with AMX and VNNI"),
    ],
)
def test_the_report_names_the_instructions_of_int8(tiles, quads, text, report):
    if quads and not torch.ops.bertfast.has_quad_instruction():
        pytest.skip("this CPU has no dot products of int8")
    torch.ops.bertfast.use_tiles(tiles)
    torch.ops.bertfast.use_quad_instruction(quads)
    try:
        facts, _ = report()
    finally:
        torch.ops.bertfast.use_tiles(None)
        torch.ops.bertfast.use_quad_instruction(True)
    assert facts["library"].endswith(f" in use, {text}")


def test_the_report_says_why_the_reference_runs(report, monkeypatch):
    monkeypatch.setattr(native, "UNAVAILABLE_REASON", "the native library was not built")
    facts, table = report()
    assert facts["library"] == "none: the native library was not built"
    assert table[1].split() == [ops.__all__[0], "reference", "reference"]
    because = "reference (plain PyTorch): the native library was not built"
    assert f"cpu fp32: {because}" in table
    assert f"cpu bf16: {because}" in table
    assert table[-3:] == [
        "To make it faster:",
        "  install a C++20 compiler and reinstall bertfast: its native library has the kernels for CPUs",
        "  use a GPU of sm_80 or later",
    ]


def test_an_unavailable_device_is_refused(capsys):
    assert main(["doctor", "--device", "nonsense"]) == 1
    assert capsys.readouterr().err.startswith("bertfast doctor: --device nonsense is not available: ")


def test_json_holds_everything_that_the_text_reports(report, capsys):
    facts, table = report()
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name.split()[0] for name in found["environment"]} == set(facts)
    assert found["operators"].keys() == set(ops.__all__)
    rows = {line.split()[0]: line.split()[1:] for line in table[1 : len(ops.__all__) + 1]}
    assert {name: [*each.values()] for name, each in found["operators"].items()} == rows
    assert found["head_dimensions"] == list(HEAD_DIMENSIONS)
    assert set(found["suggestions"]) <= {line.strip() for line in table}
    for column, reason in found["fallback_reasons"].items():
        assert f"{column}: reference (plain PyTorch): {reason}" in table


def test_json_holds_the_versions_of_packages_and_nvcc(capsys, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.1, V13.1.80'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setattr(cuda_build, "BUILD", None)
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    versions = json.loads(capsys.readouterr().out)["versions"]
    assert (versions["nvcc"], versions["nvcc_of_build"]) == ("13.1.80", None)
    assert versions["bertfast"] == bertfast.__version__
    for name in ("torch", "triton", "transformers", "tokenizers", "peft", "accelerate", "onnxruntime", "numpy"):
        try:
            assert versions[name] == importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            assert versions[name] is None
    monkeypatch.setenv("NVCC", str(tmp_path / "absent"))
    assert main(["doctor", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["nvcc"] is None


CHECK = ["doctor", "--check", "--device", "cpu"]


@pytest.fixture
def two_problems(monkeypatch):
    """Reduce the self-test to two operators, which take no time."""
    all_problems = self_test.problems

    def selected(device):
        return [problem for problem in all_problems(device) if problem.operator in ("bias_gelu", "gelu_layer_norm")]

    monkeypatch.setattr(self_test, "problems", selected)


def plant(monkeypatch, kernel, operator="bias_gelu", direction="forward"):
    """Replace every kernel of an operator in one direction by `kernel`."""
    module = sys.modules[f"bertfast.ops.{operator}"]
    original = module.operator
    monkeypatch.setattr(module, "operator", lambda *of: kernel if of[1].endswith(direction) else original(*of))


def test_every_operator_is_checked_with_every_head_dimension():
    problems = self_test.problems(torch.device("cpu"))
    assert {problem.operator for problem in problems} == set(ops.__all__)
    attention = [problem.shape for problem in problems if problem.operator == "attention"]
    for dimension in HEAD_DIMENSIONS:
        for length in ("2x128", "1x512"):
            assert {f"{length} D={dimension}", f"{length} D={dimension} dropout"} <= set(attention)


def test_attention_is_checked_with_partial_blocks_empty_sequences_and_padding_slots():
    assert {length % 64 > 0 for length in MIXED if length > 128} == {True}
    assert {0, 1} <= set(MIXED)
    mixed = [problem for problem in self_test.problems(torch.device("cpu")) if problem.shape.startswith("mixed")]
    assert {problem.shapes["qkv"][0] for problem in mixed} == {sum(MIXED) + PADDING_SLOTS}
    for dimension in HEAD_DIMENSIONS:
        assert {f"mixed D={dimension}", f"mixed D={dimension} dropout"} <= {problem.shape for problem in mixed}


def test_correct_kernels_pass(two_problems, capsys):
    assert main(CHECK) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    rows = [line for line in out.splitlines() if line.startswith(("bias_gelu", "gelu_layer_norm"))]
    assert all(row.endswith("  passed") for row in rows)
    assert {row.split()[1] for row in rows} == {"reference"} | ({"cpu"} if native.UNAVAILABLE_REASON is None else set())
    assert f"{len(rows)} of {len(rows)} checks passed, 0 were not reached." in out


@pytest.mark.parametrize("precision", self_test.PRECISIONS)
def test_the_copy_for_the_next_gemm_passes_in_every_precision(precision, capsys):
    assert main([*CHECK, "--only", "add_layer_norm", "copy", precision]) == 0
    assert "  passed" in capsys.readouterr().out


@needs_library
def test_an_output_is_judged_in_its_own_dtype_next_to_a_lower_precision_copy(monkeypatch, capsys):
    """An fp32 output with the error of its bf16 copy must fail."""

    def inexact(*arguments):
        y, *rest = torch.ops.bertfast.cpu_add_layer_norm_forward(*arguments)
        return y.bfloat16().to(y.dtype), *rest

    plant(monkeypatch, inexact, "add_layer_norm")
    assert main([*CHECK, "--only", "add_layer_norm", "copy", "cpu", "fp32"]) == 1
    assert "FAILED: output" in capsys.readouterr().out


@needs_library
def test_an_incorrect_kernel_fails_and_is_named(two_problems, monkeypatch, capsys):
    plant(monkeypatch, lambda x, bias, approximate: ops.bias_gelu(x, bias, implementation="reference") * 1.02)
    assert main(CHECK) == 1
    out = capsys.readouterr().out
    assert "FAILED: output" in next(line for line in out.splitlines() if line.startswith("bias_gelu            cpu"))
    assert "bias_gelu cpu fp32 1x512 H=3072 on cpu: failed: output" in out
    assert "gelu_layer_norm cpu fp32 77 H=768 on cpu: " not in out  # the others pass


@needs_library
@pytest.mark.parametrize(
    ("operator", "direction", "word", "index", "value"),
    [
        ("attention", "forward", "scale=0.2", 5, 0.125),
        ("attention", "forward", "causal=True", 6, False),
        ("attention", "forward", "window=20", 7, None),
        ("attention", "backward", "window=20", 10, None),
        ("embeddings", "backward", "frequent", 10, None),  # the padding index
    ],
)
def test_a_kernel_that_ignores_an_option_fails(operator, direction, word, index, value, monkeypatch, capsys):
    kernel = getattr(torch.ops.bertfast, f"cpu_{operator}_{direction}")
    plant(monkeypatch, lambda *of: kernel(*of[:index], value, *of[index + 1 :]), operator, direction)
    assert main([*CHECK, "--only", operator, "cpu", "fp32", word]) == 1
    assert "FAILED: " in capsys.readouterr().out


@needs_library
def test_nan_in_an_output_fails(two_problems, monkeypatch, capsys):
    plant(monkeypatch, lambda x, bias, approximate: torch.full_like(x, torch.nan))
    assert main([*CHECK, "--only", "bias_gelu", "cpu", "fp32"]) == 1
    assert "FAILED: output" in capsys.readouterr().out


@needs_library
def test_an_exception_in_a_kernel_is_reported_and_the_other_checks_run(two_problems, monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("no such instruction\nat line 3")

    plant(monkeypatch, broken)
    assert main([*CHECK, "--json"]) == 1
    checks = json.loads(capsys.readouterr().out)["checks"]
    errors = [check for check in checks if check["status"] == "error"]
    assert {(check["operator"], check["implementation"]) for check in errors} == {("bias_gelu", "cpu")}
    assert errors[0]["message"] == "RuntimeError: no such instruction"
    assert {check["status"] for check in checks if check not in errors} == {"passed"}


def test_checks_beyond_the_time_limit_are_listed_as_not_reached(two_problems, capsys):
    assert main([*CHECK, "--seconds", "0.000001"]) == 0
    out = capsys.readouterr().out
    assert "NOT REACHED: the time limit of 0 s is over" in out
    assert "\n0 of " in out
    assert " 0 were not reached" not in out


@needs_library
def test_a_cuda_error_ends_the_self_test(two_problems, monkeypatch):
    """After an illegal access every CUDA call of the process fails, in any kernel."""

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


def test_words_that_match_no_check_are_refused(two_problems, capsys):
    assert main([*CHECK, "--only", "nonsense"]) == 1
    assert "no check contains all words of --only nonsense: run without --only" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1"])
def test_a_time_limit_that_is_not_positive_is_refused(seconds, capsys):
    assert main(["doctor", "--check", "--seconds", seconds]) == 1
    assert f"--seconds must be more than 0, got {float(seconds)}" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [{"only": ("attention",)}, {"seconds": 5.0}])
def test_limits_of_the_checks_are_refused_without_check(limit):
    with pytest.raises(ValueError, match="requires --check"):
        DoctorSettings(**limit)


@needs_library
def test_the_row_of_a_check_begins_before_the_kernel_runs(two_problems, monkeypatch, capsys):
    """The last row then names a kernel that hangs or crashes the process."""
    printed = []

    def kernel(x, bias, approximate):
        printed.append(capsys.readouterr().out)
        return ops.bias_gelu(x, bias, approximate, implementation="reference")

    plant(monkeypatch, kernel)
    assert main([*CHECK, "--only", "bias_gelu", "cpu", "fp32"]) == 0
    assert printed[0].splitlines()[-1].split() == ["bias_gelu", "cpu", "fp32", "1x512", "H=3072"]
    rest = capsys.readouterr().out.splitlines()
    assert rest[0].endswith("  passed")
    assert "bias_gelu" not in rest[0]
    assert rest[-1].endswith(" checks passed, 0 were not reached.")


def test_the_self_test_runs_without_measuring_times(two_problems, monkeypatch):
    monkeypatch.setattr(self_test, "_times", lambda *arguments: pytest.fail("it was timed"))
    events = [*self_test.run([torch.device("cpu")], ("bias_gelu", "fp32"), 60, timed=False)]
    outcomes = [event for event in events if event.status != "running"]
    assert len(events) == 2 * len(outcomes) > 0
    assert {(one.status, one.forward_us, one.backward_us) for one in outcomes} == {("passed", None, None)}


def test_checks_without_dropout_are_selected_by_a_word_of_their_own():
    shapes = {problem.shape for problem in self_test.problems(torch.device("cpu")) if problem.operator == "attention"}
    for word in ("dropout", "no-dropout"):
        groups = self_test._groups(torch.device("cpu"), ["attention", word])
        selected = {check.problem.shape for group in groups for check in group}
        assert selected == {shape for shape in shapes if ("dropout" in shape.split()) == (word == "dropout")}
