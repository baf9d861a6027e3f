"""`python -m bertfast`: the command line."""

import sys

from bertfast.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
