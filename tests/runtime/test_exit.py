"""How processes end: workers of torchrun without the shutdown of Python, in which a thread of Gloo can abort them."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import atexit, logging.handlers, sys
from bertfast.runtime.exit import end_process

logging.basicConfig(handlers=[logging.handlers.MemoryHandler(99, target=logging.StreamHandler(sys.stdout))])
atexit.register(print, "Python shuts down")
logging.warning("logged")
sys.stdout.write("printed\\n")
end_process(3)
"""


@pytest.mark.parametrize(("processes", "end"), [(1, ["Python shuts down"]), (2, [])])
def test_workers_of_torchrun_write_everything_and_skip_the_shutdown(processes, end):
    command, environment = [sys.executable, "-c", PROGRAM], os.environ | {"WORLD_SIZE": str(processes)}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (3, "")
    assert [line for line in ran.stdout.splitlines() if line != "logged"] == ["printed", *end]
    assert "logged" in ran.stdout


def test_a_worker_whose_reader_has_gone_ends_with_its_status():
    program = "import sys; from bertfast.runtime.exit import end_process; sys.stdout.write('lost'); end_process(3)"
    command = [sys.executable, "-c", program]
    process = subprocess.Popen(
        command, env=os.environ | {"WORLD_SIZE": "2", "PYTHONUNBUFFERED": ""}, stdout=subprocess.PIPE
    )
    process.stdout.close()
    assert process.wait(60) == 3


def test_the_command_line_ends_its_process_so(monkeypatch):
    from bertfast import __main__

    ended = []
    monkeypatch.setattr(__main__, "main", lambda: 7)
    monkeypatch.setattr(__main__, "end_process", ended.append)
    __main__.run()
    assert ended == [7]
