"""The command line: `main`, and the commands that are not programs of other packages."""
