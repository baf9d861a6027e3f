"""Calls with bad inputs of all kinds end with exit code 0, 1 or 2 and at most one sentence, never with a traceback.

`make test-all` makes 2,400 calls in this process and 20 of processes of their own, `make test` the first of them.
"""

import os
import subprocess
import sys
import traceback
from importlib import import_module

import pytest
from bad_calls import Call, Generator, Inputs
from bad_outcomes import fault_of

from bertfast.cli.main import COMMANDS
from bertfast.runtime.settings import refuse_without_effect

CALLS_PER_TEST = 20
ALL_CALLS = 2400

PROCESSES = [  # how the process is started, and a command line
    ("closed input", "predict --model-name-or-path model --device cpu"),
    ("C locale", "predict --model-name-or-path model --input-file tsv_emoji.tsv --device cpu"),
    ("broken pipe", "predict --model-name-or-path model --input-file tsv_good.tsv --device cpu"),
    ("full disk", "predict --model-name-or-path model --input-file tsv_good.tsv --device cpu"),
    ("closed input", "embed --model-name-or-path model --output-dir out --device cpu"),
    ("closed input", "prepare --train-file - --output-dir out --processes 1"),
    ("closed input", "verify model --input-file - --device cpu"),
    ("closed input", "fill-mask BertForPreTraining [MASK]"),
    ("C locale", "embed --model-name-or-path model --output-dir é --input-file text_latin_1.txt --device cpu"),
    ("C locale", "prepare --train-file text_emoji.txt --output-dir é --vocab-size 128 --processes 2"),
    ("C locale", "fill-mask BertForPreTraining é[MASK]"),
    ("C locale", "finetune --model-name-or-path model --train-file csv_emoji.csv --output-dir out --device cpu"),
    ("C locale", "predict --model-name-or-path é --input-file é.tsv"),
    ("broken pipe", "--help"),
    ("broken pipe", "fill-mask BertForPreTraining [MASK]"),
    ("broken pipe", "predict --help"),
    ("read-only", "prepare --train-file text_good.txt --vocab-size 128 --processes 1"),
    ("read-only", "embed --model-name-or-path model --input-file text_good.txt --device cpu"),
    ("read-only", "finetune --model-name-or-path model --train-file csv_good.csv --device cpu"),
    ("read-only", "pretrain --train-file text_good.txt --vocab-size 128 --max-steps 1 --device cpu --processes 1"),
]


def pytest_generate_tests(metafunc):
    calls = metafunc.config.getoption("--bad-calls")
    if "first_call" in metafunc.fixturenames:
        metafunc.parametrize("first_call", range(0, calls, CALLS_PER_TEST))
    if "process" in metafunc.fixturenames:
        metafunc.parametrize("process", PROCESSES[: -(-calls * len(PROCESSES) // ALL_CALLS)])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The bad inputs."""
    return Inputs.write(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Look for models of the hub only on this machine."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.slow
def test_bad_calls_end_with_one_sentence(first_call, inputs, tmp_path, request):
    generator = Generator(inputs)
    last = min(first_call + CALLS_PER_TEST, request.config.getoption("--bad-calls"))
    calls = [generator.call(index) for index in range(first_call, last)]
    before = state_of(inputs.folder)
    found = {str(call): fault_of(call, inputs, tmp_path / "calls") for call in calls}
    faults = [f"{call}\n{fault}" for call, fault in found.items() if fault]
    assert not faults, "\n\n".join([f"{len(faults)} of {len(calls)} calls:", *faults])
    assert state_of(inputs.folder) == before, "a call has changed its inputs"


def state_of(folder):
    """Return sizes and times of the files in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def test_the_calls_are_the_same_each_time_and_use_all_commands_and_inputs(inputs):
    generator = Generator(inputs)
    calls = [generator.call(index) for index in range(ALL_CALLS)]
    assert [Generator(inputs).call(index) for index in (3, 7)] == [calls[3], calls[7]]
    assert {call.arguments[0] for call in calls} == set(COMMANDS)
    words = {word for call in calls for word in [*call.arguments, call.standard_input]}
    named = [
        *inputs.models,
        *inputs.configs,
        *inputs.checkpoints,
        *inputs.recipes,
        *(name for names in inputs.files.values() for name in names),
    ]
    assert len(set(named) - words) < 0.1 * len(named)


PLANTED = [
    *("a bug", "a message of Python", "a message without a file or flag"),
    *("a printed traceback", "a wrong status", "an error without a sentence"),
]


@pytest.mark.parametrize("planted", PLANTED)
def test_a_planted_fault_is_found(planted, inputs, tmp_path, monkeypatch):
    def run(settings):
        if planted == "a message without a file or flag":
            refuse_without_effect(["something"], "there is no reason")
        if planted == "a bug":
            return {}["key"]
        if planted == "a message of Python":
            return int("x")
        if planted == "a printed traceback":
            try:
                raise ValueError("x")
            except ValueError:
                traceback.print_exc()
        return {"a wrong status": 3, "an error without a sentence": 1}.get(planted)

    monkeypatch.setattr(import_module("bertfast.inference.fill_mask"), "fill_mask_command", run)
    assert fault_of(Call(["fill-mask", "a", "b"]), inputs, tmp_path / "calls")


@pytest.mark.slow
def test_bad_conditions_of_a_process_end_with_one_sentence(process, inputs, tmp_path):
    condition, line = process
    for path in inputs.folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    if condition == "C locale":
        environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii", "PYTHONCOERCECLOCALE": "0"}
    if condition == "read-only":
        line += " --output-dir /proc/out"  # where not even root can write
    pipe = {
        "closed input": "<&-",
        "broken pipe": "| true; exit ${PIPESTATUS[0]}",
        "full disk": "> /dev/full",
    }.get(condition, "")
    ran = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m bertfast {line} {pipe}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        timeout=300,
    )
    errors = ran.stderr.decode()
    assert ran.returncode in (0, 1, 2) or (condition, ran.returncode) == ("broken pipe", 141), errors
    assert "Traceback" not in errors + ran.stdout.decode()
    assert errors.count("bertfast ") <= 1 or "usage" in errors, errors
