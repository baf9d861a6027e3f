"""Tell errors that a user can cause from bugs, and describe them in one sentence."""

from __future__ import annotations

import dis
from types import TracebackType

from bertfast.runtime.atomic_write import reason
from bertfast.runtime.malloc import is_out_of_memory
from bertfast.runtime.signals import RunStopped

# Errors of which the message says what is wrong, no matter where they were raised.
_DESCRIBED = (OSError, ImportError, EOFError, RunStopped)
# Errors of damaged files, named by module so that recognising them imports none of the libraries.
_DAMAGED_FILE = {
    ("_pickle", "UnpicklingError"),
    ("_lzma", "LZMAError"),
    ("_csv", "Error"),
    ("zlib", "error"),
    ("zipfile", "BadZipFile"),
    ("builtins", "Exception"),  # tokenizers raises it for files that it cannot read
}
_DAMAGED_FILE_MODULES = ("safetensors", "safetensors_rust", "pyarrow", "yaml", "huggingface_hub", "zstandard")
_NUMERICAL_LIBRARIES = ("numpy", "torch")  # in which a ValueError tells of a bug of the caller


def is_user_error(error: Exception) -> bool:
    """Return whether an error is due to input, settings or the machine; otherwise it is a bug.

    A ValueError or TypeError is a user error if a `raise` statement raised it, since that has a message for the user.
    An operation of the interpreter that fails, such as `int("x")`, does not say what the user did wrong.
    """
    if isinstance(error, _DESCRIBED) or is_out_of_memory(error):
        return True
    module = type(error).__module__.partition(".")[0]
    if module in _DAMAGED_FILE_MODULES or (type(error).__module__, type(error).__name__) in _DAMAGED_FILE:
        return True
    innermost = _innermost(error.__traceback__)
    if innermost is None:
        return False
    library = str(innermost.tb_frame.f_globals.get("__name__")).partition(".")[0]
    if isinstance(error, RecursionError):
        return library == "json"
    return isinstance(error, (ValueError, TypeError)) and library not in _NUMERICAL_LIBRARIES and _raises(innermost)


def describe(error: Exception) -> str:
    """Return what is wrong, and the file if the error names one."""
    if is_out_of_memory(error):
        return "not enough memory: use smaller batches, shorter sequences or a smaller model"
    if isinstance(error, RecursionError):
        return "a JSON file is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(
            [str(name) for name in (error.filename, error.filename2) if name is not None]
            + [error.strerror if error.errno is None else reason(error.errno, error.strerror)]
        )
    return str(error) or type(error).__name__


def _innermost(traceback: TracebackType | None) -> TracebackType | None:
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback


def _raises(traceback: TracebackType) -> bool:
    """Return whether the instruction at which a frame was left is a `raise` statement."""
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == dis.opmap["RAISE_VARARGS"]
