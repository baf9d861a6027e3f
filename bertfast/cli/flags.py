"""Command-line flags of a program, generated from its settings: parsing, `--config`, and `--help`."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from bertfast.cli.recipes import find_config, read_yaml
from bertfast.runtime.settings import (
    Settings,
    WithoutEffectError,
    as_typed,
    flag,
    group_class,
    hints_of,
    is_empty,
    nearest,
    range_of,
    settings_of,
)

# A command line: the name of the entry of a file, or "" if typed; the flag and its values.
_Flags = list[tuple[str, list[str]]]

_NOUNS: dict[Any, str] = {str: "a string", int: "an integer", float: "a number"}
SettingsT = TypeVar("SettingsT", bound=Settings)


_REGISTRY = ConstructorRegistry()


@_REGISTRY.primitive_rule
def _value(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read a string or number, or one that may be None, and show it in help as a string or number.

    YAML's null arrives as "None".
    """
    alternatives = get_args(info.type) if get_origin(info.type) in (Union, UnionType) else (info.type,)
    is_optional = NoneType in alternatives
    kind, *others = [_without_range(kind) for kind in alternatives if kind is not NoneType] or [NoneType]
    if others or kind not in _NOUNS:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=kind.__name__.upper(),
        instance_from_str=lambda texts: None if is_optional and texts == ["None"] else _read(kind, texts[0]),
        is_instance=lambda value: isinstance(value, kind) or (is_optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _values_of_list(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Read a list of numbers, so that a message names the one that is none."""
    kind = _without_range(get_args(info.type)[0]) if get_origin(info.type) is list else None
    if kind not in (int, float):
        return None
    name = kind.__name__.upper()
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar=f"[{name} [{name} ...]]",
        instance_from_str=lambda texts: [_read(kind, text) for text in texts],
        is_instance=lambda values: isinstance(values, list),
        str_from_instance=lambda values: [*map(str, values)],
    )


def _without_range(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _read(kind: Any, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"must be {_NOUNS[kind]}, got {text!r}") from None


def parse(
    command: str, settings_class: type[SettingsT], arguments: list[str], description: str | None = None
) -> SettingsT:
    """Return the settings of a command from its arguments.

    Args:
        command: Name of the command, for help and messages.
        settings_class: Class of its settings.
        arguments: Flags with their values. `--config` is replaced by the entries of a YAML file or of an installed
            recipe; of a flag given more than once, the last value counts, and a flag after `--config` also replaces the
            entries of the file that exclude it, or that the flag disables.
        description: Text above the flags in `--help`; None: the first paragraph of the class's docstring.

    Raises:
        ValueError: A value is empty or out of its range, or the YAML file has an entry that is not a setting.
        SystemExit: A flag is unknown, required or cannot be read, or `--help` was given.
    """
    flags = _without_config(arguments, command, settings_class)
    read = partial(_read_values, command, settings_class, description)
    while True:
        values = read(flags)
        _refuse_empty(settings_class, values)
        try:
            with as_typed(_typed_names(flags)):
                return settings_class.of(**values)
        except WithoutEffectError as error:
            dropped = _disabled_by_typed(flags, error.flags, read, settings_class)
            if not dropped:
                raise
            flags = [known for known in flags if known[0] not in dropped]


def _read_values(
    command: str, settings_class: type[Settings], description: str | None, flags: _Flags
) -> dict[str, Any]:
    """Return the values of a command line by name; see `parse`."""
    parsed = tyro.cli(
        _flag_class(settings_class),
        prog=f"bertfast {command}",
        description=description,
        args=[part for _, parts in flags for part in parts],
        registry=_REGISTRY,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),  # help texts are given below
    )
    return dict(_values(parsed))


def flags_of(entries: Mapping[str, Any]) -> list[str]:
    """Return names and values as command-line flags: True as `--name`, False as `--no-name`, a list as many values."""
    flags = []
    for name, value in entries.items():
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _refuse_empty(settings_class: type[Settings], values: dict[str, Any]) -> None:
    """Raise ValueError if a text or a path is empty, as when a shell's variable is not set."""
    for name, setting in settings_of(settings_class).items():
        if is_empty(setting.field, values[name]):
            shown = _metavar(name) if _is_positional(setting.hint) else flag(name)
            required = setting.field.default is setting.field.default_factory is dataclasses.MISSING
            raise ValueError(f"{shown} is empty: give a value" + ", or leave it out" * (not required))


def _is_positional(hint: Any) -> bool:
    return get_args(hint)[1:] == get_args(tyro.conf.Positional[str])[1:]


def _metavar(name: str) -> str:
    """Return the name of an argument without a flag."""
    return name.replace("_", "-").upper()


def _disabled_by_typed(
    flags: _Flags, without_effect: list[str], read: Callable[[_Flags], dict[str, Any]], settings_class: type[Settings]
) -> set[str]:
    """Return which entries of a file have no effect because of flags that were typed.

    Args:
        flags: The command line.
        without_effect: Flags that have no effect in it.
        read: Returns the values of a command line by name.
        settings_class: Class of the settings.
    """
    typed = {name.replace("_", "-") for name in _typed_names(flags)}
    in_file = {name for name, _ in flags if name}
    found = {name.removeprefix("--") for name in without_effect} & in_file - typed
    if not found:
        return found
    # Of a flag in both, the last value counts, here that of the file.
    values = read(sorted(flags, key=lambda known: known[0] != ""))
    required = [name for name, setting in settings_of(settings_class).items() if _default(setting.field, None)[0]]
    names = {*required, *(name.replace("-", "_") for name in in_file)}
    try:
        with as_typed(()):
            settings_class.of(**{name: values[name] for name in names})
    except WithoutEffectError as error:
        return found - {name.removeprefix("--") for name in error.flags}  # the file contradicts itself
    except ValueError:
        pass  # other flags are lacking
    return found


def _without_config(arguments: list[str], command: str, settings_class: type[Settings]) -> _Flags:
    """Return a command line in which the flags of its file or recipe replace each `--config`.

    A flag after `--config` also replaces the entries of the file that exclude it: `--config cpu --max-steps 100` runs
    100 steps, although the recipe has `minutes`.
    """
    rivals = _rivals(settings_class)
    flags: _Flags = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config" or argument.startswith("--config="):
            name = next(rest, None) if argument == "--config" else argument.removeprefix("--config=")
            entries = _config_entries(name, command, settings_class)
            new = [(entry, flags_of({entry: value})) for entry, value in entries.items()]
            given = list(entries)
        else:
            new = [("", [argument])]
            given = [_entry(argument)]
        replaced = {rival for name in given for rival in rivals.get(name, ())}
        flags = [known for known in flags if known[0] not in replaced] + new
    return flags


def _entry(argument: str) -> str:
    """Return the name in a file of a flag, or of a flag's value as it is."""
    return argument.partition("=")[0].removeprefix("--").removeprefix("no-").replace("_", "-")


def _typed_names(flags: _Flags) -> set[str]:
    """Return the names of the settings whose flags were typed."""
    return {_entry(parts[0]).replace("-", "_") for name, parts in flags if not name and parts[0].startswith("--")}


def _rivals(settings_class: type[Settings]) -> dict[str, set[str]]:
    """Return, by name of a flag, the flags that exclude it."""
    classes = [settings_class, *filter(None, map(group_class, hints_of(settings_class).values()))]
    names = [{name.replace("_", "-") for name in known.exclusive} for known in classes]
    return {name: exclusive - {name} for exclusive in names for name in exclusive}


def _config_entries(name: str | None, command: str, settings_class: type[Settings]) -> dict[str, Any]:
    """Return a YAML file's entries, which become flags so that files and command lines are validated alike."""
    if name is None:
        raise ValueError("--config requires a YAML file or the name of a recipe")
    entries = read_yaml(find_config(name), f"--config {name}")
    known = [known_name.replace("_", "-") for known_name in settings_of(settings_class)]
    for entry in map(str, entries):
        if entry.replace("_", "-") not in known:
            raise ValueError(f"--config {name}: bertfast {command} has no setting {entry}{nearest(entry, known)}")
    values = {str(entry).replace("_", "-"): value for entry, value in entries.items()}
    for setting in settings_of(settings_class).values():
        shown = setting.name.replace("_", "-")
        if shown in values and values[shown] is None and NoneType not in get_args(setting.hint):
            raise ValueError(f"--config {name}: {shown} is empty: give a value, or remove the line")
    return values


def _flag_class(settings_class: type[Settings], default: Settings | None = None) -> type[Any]:
    """Return a plain dataclass with the fields and groups of a settings class, in which tyro finds the help texts.

    Values are checked when the settings are built from it: only then are all of them known.

    Args:
        settings_class: Class of the settings.
        default: Settings whose values are the defaults; None: the defaults of the class.
    """
    texts = _descriptions(settings_class)
    fields: list[tuple[str, Any, Any]] = []
    for field in dataclasses.fields(settings_class):
        if field.name in settings_class.unused:
            continue
        hint = hints_of(settings_class)[field.name]
        required, value = _default(field, default)
        nested = group_class(hint)
        if nested is not None:
            hint = _flag_class(nested, value)
            fields.append((field.name, hint, dataclasses.field(default_factory=hint)))
            continue
        metavar = _metavar(field.name) if _is_positional(hint) else None
        shown = None
        if not required and value in (None, "", [], ()):
            shown = ""  # the text says what happens if the flag is not given
        elif required and get_origin(_without_range(hint)) is list:
            shown = "(required)"  # tyro takes an empty list for its default
        text = _help(texts[field.name], hint)
        hint = Annotated[hint, tyro.conf.arg(help=text, metavar=metavar, help_behavior_hint=shown)]
        new = dataclasses.field() if required else dataclasses.field(default_factory=partial(copy.copy, value))
        fields.append((field.name, hint, new))
    summary = inspect.cleandoc(settings_class.__doc__ or "").split("\n\n")[0]
    return dataclasses.make_dataclass(
        settings_class.__name__, fields, namespace={"__doc__": summary}, kw_only=True, frozen=True
    )


def _default(field: dataclasses.Field[Any], default: Settings | None) -> tuple[bool, Any]:
    """Return whether a field is required, and its default."""
    if default is not None:
        return False, getattr(default, field.name)
    if field.default_factory is not dataclasses.MISSING:
        return False, field.default_factory()
    return field.default is dataclasses.MISSING, field.default


def _help(text: str, hint: Any) -> str:
    limits = range_of(hint)
    if limits is None:
        return text
    return f"{text} Range: {str(limits) or ('any integer' if get_args(hint)[0] is int else 'any finite number')}."


def _descriptions(settings_class: type[Settings]) -> dict[str, str]:
    """Return the text of each field from the `Attributes:` sections of a class and its bases."""
    texts: dict[str, str] = {}
    for base in reversed(settings_class.__mro__):
        _, _, section = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        for name, text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE):
            texts[name] = " ".join(text.split())
    return texts


def _values(parsed: Any) -> Iterator[tuple[str, Any]]:
    """Yield names and values of what tyro parsed, those of its groups included."""
    for field in dataclasses.fields(parsed):
        value = getattr(parsed, field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value)
        else:
            yield field.name, value
