"""What a call of a command with bad inputs may do, and whether it did something else."""

import io
import linecache
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import cast

from bad_calls import Call, Inputs

import bertfast
from bench.harness import time_limit
from bertfast.cli.main import main
from bertfast.runtime.atomic_write import remove
from bertfast.runtime.malloc import is_out_of_memory

SECONDS = 60  # after which a call is taken to hang
PACKAGE = str(Path(bertfast.__file__).parent)


class _ErrorStream(io.StringIO):
    """Standard error that notes the exception which is being handled when something is written to it."""

    error: BaseException | None = None

    def write(self, text: str) -> int:
        if text.startswith("bertfast "):
            self.error = self.error or sys.exception()
        return super().write(text)


def fault_of(call: Call, inputs: Inputs, folder: Path) -> str | None:
    """Run a call in a folder that links to the inputs; return what is wrong with how it ended, or None.

    The folder is made if it does not exist. What the call writes there is removed.
    """
    links = {folder / path.name: path for path in inputs.folder.iterdir()}
    if not folder.exists():
        folder.mkdir()
        for link, path in links.items():
            link.symlink_to(path)
    if call.damage is not None:
        call.damage.copy_to(folder, inputs.states, inputs.folder)
    content = b"" if call.standard_input is None else (inputs.folder / call.standard_input).read_bytes()
    err, out = _ErrorStream(), io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    limit = time_limit(SECONDS, RuntimeError)  # a TimeoutError would be taken for one of the user's errors
    try:
        with chdir(folder), _standard_input(content), redirect_stderr(err), redirect_stdout(out), limit:
            status: object = main(call.arguments)
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        return "".join(traceback.format_exception(error))
    finally:
        for written in folder.iterdir():
            if written not in links:
                remove(written)
    known = ["standard input", "the text", *(path.name for path in links), *call.arguments[1:]]
    return _fault(status, err, out, known)


def _fault(status: object, err: _ErrorStream, out: io.TextIOWrapper, known: list[str]) -> str | None:
    """Return what is wrong with how a call ended, or None; `known` are words of which an error must have one."""
    text = err.getvalue()
    sentences = re.findall(r"^bertfast(?: \S+)?: .*", text, re.MULTILINE)
    out.flush()
    printed = out.buffer.getvalue().decode()  # type: ignore[attr-defined]  # it is a BytesIO
    if status not in (0, 1, 2):
        return f"exit code {status}"
    if "Traceback (most recent call last)" in text + printed:
        return f"a traceback is printed:\n{text}"
    if len(sentences) > 1 or (status == 1) != bool(sentences):
        return f"exit code {status} with {len(sentences)} error sentences:\n{text}"
    if sentences and not text.rstrip().endswith(sentences[0].rstrip()):
        return f"the error has more than one line:\n{text}"
    if sentences and not names_its_cause(sentences[0], known):
        return f"an error that names neither a flag nor a file:\n{text}"
    if isinstance(err.error, Exception) and not (is_out_of_memory(err.error) or is_deliberate(err.error)):
        return "an error that was not worded for users:\n" + "".join(traceback.format_exception(err.error))
    return None


def names_its_cause(sentence: str, known: list[str]) -> bool:
    """Return whether an error names a flag, an argument such as OUTPUT-DIR, or one of the known words."""
    message = sentence.partition(": ")[2]
    if re.search(r"--[a-z]|^[A-Z-]+ is", message):
        return True
    return any(
        (len(name) > 2 and name in message)
        or message.startswith(name)
        or message.endswith((f" {name}", repr(name)))
        or f"in {name!r}" in message
        for name in filter(None, known)
    )


def is_deliberate(error: BaseException) -> bool:
    """Return whether an error was raised by a `raise` statement of this package, or by the system about a path."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    if last.filename.startswith(PACKAGE):
        lines = linecache.getlines(last.filename)
        if last.lineno and lines[last.lineno - 1].lstrip().startswith("raise "):
            return True
    return isinstance(error, OSError) and error.filename is not None and error.strerror is not None


@contextmanager
def _standard_input(content: bytes) -> Iterator[None]:
    before = sys.stdin
    buffered = io.BufferedReader(cast(io.RawIOBase, io.BytesIO(content)))  # has `peek`, as a pipe has
    sys.stdin = io.TextIOWrapper(buffered, encoding="utf-8")
    try:
        yield
    finally:
        sys.stdin = before
