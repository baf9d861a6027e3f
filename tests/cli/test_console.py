"""Exit statuses and output of commands: signals, readers that go away, locales, and errors that are not bugs."""

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from bertfast.cli.main import main

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}


@pytest.fixture
def doctor(monkeypatch):
    """Return a function that makes `bertfast doctor` run its argument."""
    return lambda function: monkeypatch.setattr("bertfast.cli.doctor.doctor", lambda settings: function())


def fail(error):
    raise error


@pytest.mark.parametrize("arguments", [["--help"], ["pretrain", "--help"], ["doctor"]])
def test_a_reader_that_has_gone_ends_a_command_silently(arguments, doctor, monkeypatch, capfd):
    doctor(lambda: print("x" * 100_000))
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as broken:
        monkeypatch.setattr("sys.stdout", broken)
        assert main(arguments) == 141
    assert capfd.readouterr().err == ""


def test_output_to_a_full_disk_is_an_error_of_one_sentence(monkeypatch, capfd):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["--help"]) == 1
    assert (
        capfd.readouterr().err == "bertfast: No space left on device: free space on the disk, or write to another one\n"
    )


def test_a_closed_standard_output_is_no_error(monkeypatch):
    monkeypatch.setattr("sys.stdout", None)
    assert main(["--help"]) == 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--model-name-or-path", "m"],
        ["fill-mask", "m", "a [MASK]"],
        ["evaluate", "--model-name-or-path", "m", "--validation-file", "a.tsv"],
        ["verify", "m"],
        ["bench", "m"],
        ["doctor"],
    ],
)
def test_results_that_nobody_would_get_are_refused(arguments, monkeypatch, capfd):
    monkeypatch.setattr("sys.stdout", None)
    assert main(arguments) == 1
    assert "standard output is closed, and the results go there" in capfd.readouterr().err


def test_output_is_utf8_in_every_locale(doctor, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", stream)
    doctor(lambda: print("β \udce9"))
    assert main(["doctor"]) == 0
    assert stream.buffer.getvalue() == "β \ufffd\n".encode()


def test_sigterm_ends_a_command_with_status_143_after_cleaning_up(doctor):
    def wait():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned_up.append(True)

    cleaned_up: list[bool] = []
    before = signal.getsignal(signal.SIGTERM)
    doctor(wait)
    with pytest.raises(SystemExit) as stopped:
        main(["doctor"])
    assert (stopped.value.code, cleaned_up, signal.getsignal(signal.SIGTERM)) == (143, [True], before)


def test_a_command_runs_in_another_thread(doctor):
    doctor(lambda: 7)
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(main(["doctor"])))
    thread.start()
    thread.join()
    assert statuses == [7]


@pytest.mark.parametrize(("command", "continues"), [("doctor", False), ("embed", True)])
def test_an_interrupt_ends_a_command_with_status_130(command, continues, monkeypatch, capsys):
    interrupt = lambda *_: fail(KeyboardInterrupt())  # noqa: E731
    monkeypatch.setattr("bertfast.cli.main.parse", interrupt)
    assert main([command]) == 130
    error = capsys.readouterr().err
    assert f"bertfast {command}: interrupted" in error
    assert ("run the same command again" in error) == continues


def test_log_messages_go_to_standard_error(doctor, capsys):
    logger = logging.getLogger("bertfast")
    doctor(lambda: (logger.info("read 3 rows"), logger.warning("one is empty"), logger.debug("x"), None)[-1])
    for _ in range(2):
        assert main(["doctor"]) == 0
        assert capsys.readouterr() == ("", "read 3 rows\nwarning: one is empty\n")


def test_log_messages_stand_above_progress_bars(doctor, capsys):
    def log_during_progress():
        with tqdm(total=3, leave=False) as bar:
            bar.update(1)
            logging.getLogger("bertfast").info("read 3 rows")

    doctor(log_during_progress)
    assert main(["doctor"]) == 0
    lines = re.split("[\r\n]", capsys.readouterr().err)
    assert "read 3 rows" in lines  # and not at the end of a bar's line


def loads_deeply_nested_json():
    import json

    json.loads("[" * 100_000)


def loads_a_damaged_model():
    from safetensors.torch import load

    load(b"\xff" * 20)


def opens_no_tokenizer():
    from tokenizers import Tokenizer

    Tokenizer.from_str("{}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda: Path("/no/such").read_text(), "/no/such: No such file or directory"),
        (lambda: os.rename("/no/a", "/no/b"), "/no/a: /no/b: No such file or directory"),
        (lambda: fail(OSError(28, "No space left on device")), "No space left on device"),
        (lambda: fail(MemoryError()), "not enough memory"),
        (lambda: torch.empty(2**60), "not enough memory"),
        (lambda: fail(ValueError("a sentence")), "a sentence"),
        (loads_deeply_nested_json, "nested too deeply"),
        (loads_a_damaged_model, "header"),
        (opens_no_tokenizer, "Model missing"),
    ],
)
def test_an_error_that_a_user_can_cause_is_one_sentence(function, message, doctor, capsys):
    doctor(function)
    assert main(["doctor"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("bertfast doctor: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda: int("x"), ValueError),
        (lambda: None + 1, TypeError),
        (lambda: {}["x"], KeyError),
        (lambda: torch.ones(2) @ torch.ones(3), RuntimeError),
        (lambda: torch.zeros(1, 2).expand(3, 4), RuntimeError),
        (lambda: fail(AssertionError("x")), AssertionError),
    ],
)
def test_a_bug_keeps_its_traceback(function, error, doctor):
    doctor(function)
    with pytest.raises(error):
        main(["doctor"])


def test_processes_end_with_the_statuses_of_their_signals():
    code = (  # a shell lets its background jobs ignore SIGINT
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from bertfast.cli import main; "
        "main._run = lambda *_: print('on', flush=True) or time.sleep(60); sys.exit(main.main(['x']))"
    )
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = subprocess.Popen([sys.executable, "-c", code], **PIPES, text=True)
        assert process.stdout.readline() == "on\n"
        process.send_signal(number)
        assert "Traceback" not in process.communicate()[1]
        assert process.returncode == status


def test_a_reader_that_has_gone_and_an_ascii_locale_show_no_error():
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    process = subprocess.Popen([sys.executable, "-m", "bertfast", "--help"], **PIPES, env=os.environ | ascii_only)
    process.stdout.close()
    assert (process.stderr.read(), process.wait()) == (b"", 141)


@pytest.mark.parametrize("utf8_mode", ["", "0"])  # as Python decides, and switched off
def test_names_of_files_are_utf8_in_the_c_locale(utf8_mode, tmp_path):
    (tmp_path / "é.txt").write_bytes(b"a line\nbad \xff\n")
    locale = {"LC_ALL": "C", "PYTHONUTF8": utf8_mode, "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, "-m", "bertfast", "prepare", "--train-file", "é.txt", "--output-dir", "ausgabe-ß"]
    ran = subprocess.run(command, **PIPES, env=os.environ | locale, cwd=tmp_path, check=False)
    error = ran.stderr.decode().strip().splitlines()[-1]
    assert (ran.returncode, error) == (
        1,
        f"bertfast prepare: {tmp_path}/é.txt, line 2: not UTF-8 (byte 0xff at column 5); convert the text to UTF-8",
    )
