"""Text for people: names of files may have bytes that are not UTF-8, which Python holds as surrogates."""

from __future__ import annotations

import codecs

SHOW_ERRORS = "bertfast.show"
"""Name of the error handler with which streams and files are written that people read."""


def _show(error: UnicodeError) -> tuple[bytes, int]:
    """Replace bytes of names that are not UTF-8 by U+FFFD, as file managers do, and escape other surrogates."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    shown = "".join(
        "\N{REPLACEMENT CHARACTER}" if "\udc80" <= character <= "\udcff" else f"\\u{ord(character):04x}"
        for character in characters
    )
    return shown.encode(), error.end  # the codec accepts other than ASCII as bytes only


codecs.register_error(SHOW_ERRORS, _show)


def require_utf8(path: str, what: str) -> None:
    """Raise ValueError if a path has bytes that are not UTF-8: libraries cannot open models and plots there.

    Args:
        path: The path.
        what: What it is the path of, for the message.
    """
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} {path}: the name is not UTF-8, which models need: give another name") from None
