"""The command that installs an optional group of packages, for messages that name a missing one."""


def install_command(extra: str) -> str:
    """Return the command that installs an extra of bertfast, quoted for every shell."""
    return f"pip install 'bertfast[{extra}]'"
