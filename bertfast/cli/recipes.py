"""The configurations that are installed with the package: `recipes/` in a checkout, `bertfast/recipes` in a wheel."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

_MAX_BYTES, _MAX_ALIASES, _MAX_DEPTH = 2**18, 10, 20
_STARTS = (
    yaml.BlockMappingStartToken,
    yaml.BlockSequenceStartToken,
    yaml.FlowMappingStartToken,
    yaml.FlowSequenceStartToken,
)
_ENDS = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
_NULL = "tag:yaml.org,2002:null"
_RESPELLED = re.compile(r"[-+]?(0[0-9_]|[^.]*:)")  # YAML 1.1 reads octal numbers, and numbers to the base of 60
_PACKAGE = Path(__file__).resolve().parents[1]


class _Entries(yaml.SafeLoader):
    """A loader that refuses repeated keys, of which YAML would keep the last value, and values that YAML changes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value.replace("-", "_") for key in keys]
        for index, key in enumerate(keys):
            if names[index] in names[:index]:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        value = super().construct_object(node, deep)
        problem = None
        if isinstance(node, yaml.SequenceNode) and any(item.tag == _NULL for item in node.value):
            problem = 'a value of the list is empty: write "null" in quotes, or remove it'
        elif isinstance(value, int | float) and isinstance(node, yaml.ScalarNode) and _RESPELLED.match(node.value):
            problem = f'{node.value} is read as {value}: write "{node.value}" in quotes, or {value}'
        elif isinstance(value, str) and "\0" in value:
            problem = "the character \\0 cannot be in a value: remove it"
        if problem is not None:
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
        return value


def recipes_folder() -> Path:
    """Return the folder of the installed recipes."""
    installed = _PACKAGE / "recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def recipe_names() -> list[str]:
    """Return the names that `--config` accepts in place of a path, sorted."""
    return sorted(path.stem for path in recipes_folder().glob("*.yaml"))


def find_config(name: str) -> Path:
    """Return the YAML file that `--config` names: an existing file, else the installed recipe of that name.

    Raises:
        FileNotFoundError: There is neither such a file nor such a recipe.
    """
    if (path := Path(name)).is_file():
        return path
    if name in recipe_names():
        return recipes_folder() / f"{name}.yaml"
    raise FileNotFoundError(
        f"--config {name}: no such file or recipe; give a YAML file or one of {', '.join(recipe_names())}"
    )


def read_yaml(path: Path, label: str) -> dict[str, Any]:
    """Return the entries of a YAML file.

    Args:
        path: The file.
        label: What the user typed to name the file, for messages.

    Raises:
        ValueError: The file is not UTF-8 text, not valid YAML, too large, or holds something other than `name: value`
            lines.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(
            f"{label}: has {path.stat().st_size:,} bytes; give `name: value` lines, at most {_MAX_BYTES:,}"
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        _check_bounds(text, label)
        entries = _Entries(text).get_single_data()
    except UnicodeDecodeError as error:
        raise ValueError(f"{label}: not UTF-8 text: {error.reason} at byte {error.start}") from None
    except yaml.MarkedYAMLError as error:
        mark, problem = error.problem_mark or error.context_mark, error.problem or error.context
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ValueError(f"{label}{line}: {problem or 'invalid YAML'}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{label}: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict | None):
        raise ValueError(f"{label}: must hold `name: value` lines, got {entries!r:.60}")
    return entries or {}


def _check_bounds(text: str, label: str) -> None:
    """Raise ValueError if YAML is nested deeply, or has so many aliases of aliases that it could fill all memory."""
    aliases = depth = 0
    for token in yaml.scan(text):
        aliases += isinstance(token, yaml.AliasToken)
        depth += isinstance(token, _STARTS) - isinstance(token, _ENDS)
        if aliases > _MAX_ALIASES:
            raise ValueError(f"{label}: has more than {_MAX_ALIASES} aliases (*name); repeat the values instead")
        if depth > _MAX_DEPTH:
            raise ValueError(f"{label}: too deeply nested; give `name: value` lines")
