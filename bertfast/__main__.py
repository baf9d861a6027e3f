"""`python -m bertfast`: the command line."""

import sys

from bertfast.cli.main import main

sys.exit(main())
