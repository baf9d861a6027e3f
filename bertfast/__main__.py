"""`bertfast` and `python -m bertfast`: the command line."""

from __future__ import annotations

from typing import NoReturn

from bertfast.cli.main import main
from bertfast.runtime.exit import end_process


def run() -> NoReturn:
    """Run the command line of this process, and end the process with its exit status."""
    end_process(main())


if __name__ == "__main__":
    run()
