"""`bertfast doctor` tells what is so."""

import pytest
import torch

from bertfast import compiled, ops
from bertfast.cli import main


@pytest.fixture
def told(capsys, monkeypatch):
    """Call it for what the command prints: its facts by name, and the lines that follow them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    def run() -> tuple[dict[str, str], list[str]]:
        assert main(["doctor", "--device", "cpu"]) == 0
        facts, _, table = capsys.readouterr().out.partition("\n\n")
        return dict(line.split(maxsplit=1) for line in facts.splitlines()), table.splitlines()

    return run


@pytest.mark.skipif(compiled.ABSENT is not None, reason=str(compiled.ABSENT))
def test_names_the_library_and_what_runs_each_operation(told):
    facts, table = told()
    assert torch.__version__ in facts["versions"]
    assert facts["library"].startswith(f"{compiled.path()}; instruction sets plain")
    assert facts["library"].endswith(f"{compiled.instruction_set()} in use")
    assert facts["training"].startswith("on cpu in ")
    assert [line.split() for line in table[1 : len(ops.__all__) + 1]] == [[name, "cpu", "cpu"] for name in ops.__all__]


def test_says_why_there_are_no_kernels(told, monkeypatch):
    monkeypatch.setattr(compiled, "ABSENT", "the compiled library was not built")
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
    assert capsys.readouterr().err.startswith("bertfast doctor: device 'nonsense' is not to be had here")
