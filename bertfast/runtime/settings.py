"""Settings of programs: nested dataclasses, in which every number has a declared range.

The settings of a program derive from `Settings`. Their fields are values and groups, one group per subject; groups
derive from `Settings` too. The names of all values differ, also between groups, so that they can be used flat: as
flags (`--learning-rate`), in YAML files, in saved runs and in Python:

    settings = PretrainSettings.of(output_dir="model", learning_rate=2e-4)
    settings.optimizer.learning_rate
    settings = settings.replace(resume=True)

A command line, `of`, `replace`, a constructor and `dataclasses.replace` check each value against its type, and keep it
as JSON can hold it: a path as a string, a number of numpy as one of Python, an array or an iterator as a list, and one
value where a list is expected as a list of one.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Self, Union, cast, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Values that a number may have, declared as `Annotated[float, Range(0, 1)]`; without limits: any finite number.

    Attributes:
        minimum: Smallest value.
        maximum: Largest value.
        above: Value that the number must exceed.
        below: Value that the number must stay below.
    """

    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (isinstance(value, int) or math.isfinite(value))
            and (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if self.minimum is not None and self.maximum is not None:
            return f"from {self.minimum} to {self.maximum}"
        limits = {
            "at least": self.minimum,
            "more than": self.above,
            "at most": self.maximum,
            "less than": self.below,
        }
        return " and ".join(f"{words} {limit}" for words, limit in limits.items() if limit is not None)


_LARGEST = 2**31 - 1  # of integers without a declared maximum, as arrays and kernels count in 32 bits

Count = Annotated[int, Range(1)]
"""At least 1."""
CountOrOff = Annotated[int, Range(0)]
"""At least 0, which switches something off or stands for none."""
Fraction = Annotated[float, Range(0, 1)]
NonNegative = Annotated[float, Range(0)]
LearningRate = Annotated[float, Range(0, 3e38)]  # optimizers hold it in fp32
Positive = Annotated[float, Range(above=0)]
Epochs = Annotated[float, Range(maximum=1_000_000, above=0)]  # steps, a multiple, must be a number of 64 bits
Seed = Annotated[int, Range(0, 2**32 - 1)]


@dataclass(frozen=True)
class Setting:
    """A value among the settings of a program.

    Attributes:
        name: Its name, unique among the settings of the program.
        hint: Its type, with the declared range.
        field: Field of its dataclass.
        group: Name of the group that holds it; None: the settings themselves.
    """

    name: str
    hint: Any
    field: dataclasses.Field[Any]
    group: str | None


_typed: ContextVar[frozenset[str] | None] = ContextVar("typed", default=None)
_TYPED = "_typed"  # the attribute in which settings keep the names of their values that were typed


@contextmanager
def as_typed(names: Iterable[str]) -> Iterator[None]:
    """Build settings in the body of which values of these names count as given, although they may be the defaults.

    Elsewhere, the names of a constructor's arguments are those that were typed.
    """
    token = _typed.set(frozenset(names))
    try:
        yield
    finally:
        _typed.reset(token)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of the settings of a program and of their groups; subclasses are frozen dataclasses.

    Attributes:
        exclusive: Names of fields of which at most one may be given.
        unused: Names of inherited fields that a program does not read: they keep their defaults, and have no flag.
    """

    exclusive: ClassVar[tuple[str, ...]] = ()
    unused: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *arguments: Any, **values: Any) -> Self:
        """Note which values are typed: those that are passed, unless they are all values, as in a copy."""
        self = super().__new__(cls)
        typed = _typed.get()
        if typed is None:
            positional = [field.name for field in dataclasses.fields(cls) if not field.kw_only]
            typed = frozenset(positional[: len(arguments)]).union(values)
            if typed.issuperset(name for name, hint in hints_of(cls).items() if group_class(hint) is None):
                typed = frozenset()
        object.__setattr__(self, _TYPED, typed)
        return self

    def __post_init__(self) -> None:
        for name, hint in hints_of(type(self)).items():
            value = checked(name, hint, getattr(self, name))
            object.__setattr__(self, name, value)
            if is_empty(type(self).__dataclass_fields__[name], value):
                raise ValueError(f"{flag(name)} is empty: give a value")
        rivals = [name for name in given(self) if name in map(flag, self.exclusive)]
        if len(rivals) > 1:
            raise ValueError(f"{' and '.join(rivals)} exclude each other: give only one of them")
        self.validate()

    def validate(self) -> None:
        """Raise ValueError if values contradict one another; ranges and choices have been checked already."""

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Build settings from values by name, without naming their groups; a whole group may be given too.

        As on the command line, a value that is named is given, although it may be the default.

        Raises:
            TypeError: There is no such setting, or a required one is missing.
            ValueError: A value has another type or is out of its range, or values contradict one another.
        """
        return cls(**_by_field(cls, values, {}))

    def replace(self, **values: Any) -> Self:
        """Return a copy with other values, given as to `of`."""
        before = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        with as_typed(vars(self)[_TYPED].union(values)):
            return type(self)(**before | _by_field(type(self), values, before))

    def flat(self) -> dict[str, Any]:
        """Return all values by name."""
        return {
            setting.name: getattr(self if setting.group is None else getattr(self, setting.group), setting.name)
            for setting in settings_of(type(self)).values()
        }


def flag(name: str) -> str:
    """Return the command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def given(settings: Settings) -> list[str]:
    """Return the flags of all values that are given, those of groups included.

    These differ from their defaults, or were typed; a typed default of None, False or 0 stands for what is not given.
    """
    flags = []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(value, Settings):
            flags += given(value)
        elif value != default or (value and field.name in vars(settings)[_TYPED]):
            flags.append(flag(field.name))
    return flags


def is_empty(field: dataclasses.Field[Any], value: Any) -> bool:
    """Return whether a text or a path is empty, or one of a list, although the default is not."""
    return (value == "" != field.default) or (isinstance(value, list | tuple) and "" in value)


class WithoutEffectError(ValueError):
    """Values that would have no effect are given.

    Attributes:
        flags: Their flags.
    """

    def __init__(self, flags: list[str], reason: str):
        super().__init__(f"{' and '.join(flags)} would have no effect: {reason}")
        self.flags = flags


def refuse_without_effect(flags: Iterable[str], reason: str) -> None:
    """Raise WithoutEffectError if flags are given that would have no effect, with the reason."""
    if flags := list(flags):
        raise WithoutEffectError(flags, reason)


def refuse_repeated(name: str, values: Sequence[object]) -> None:
    """Raise ValueError if a list has a value twice, as runs with it would count twice."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise ValueError(f"{flag(name)} has {value} more than once")


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, in the plural unless the number is 1."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean NAME?" with the known name that is most similar, or "" if none is."""
    near = difflib.get_close_matches(name, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def hints_of(settings_class: type[Settings]) -> dict[str, Any]:
    """Return the types of a class's fields, with their ranges."""
    return _hints(cast("Hashable", settings_class))  # mypy takes the __hash__ of instances for that of the class


@cache
def _hints(settings_class: Any) -> dict[str, Any]:
    hints = get_type_hints(settings_class, include_extras=True)
    names = [field.name for field in dataclasses.fields(settings_class)]
    return {name: hints[name] for name in names if name not in settings_class.unused}


def group_class(hint: Any) -> type[Settings] | None:
    """Return the class of a field that is a group; None: the field is a value."""
    return hint if isinstance(hint, type) and issubclass(hint, Settings) else None


def settings_of(settings_class: type[Settings]) -> dict[str, Setting]:
    """Return all values of a program's settings by name, those of its groups included."""
    found: dict[str, Setting] = {}
    for setting in _walk(settings_class):
        if setting.name in found:
            raise TypeError(f"{settings_class.__name__} has two settings called {setting.name}")
        found[setting.name] = setting
    return found


def range_of(hint: Any) -> Range | None:
    """Return the range that a type declares, for itself or for the items of a list; None: it declares none."""
    for item in getattr(hint, "__metadata__", ()):
        if isinstance(item, Range):
            return item
    if get_origin(hint) is Literal:
        return None
    return next(filter(None, map(range_of, get_args(hint))), None)


def _walk(settings_class: type[Settings], group: str | None = None) -> Iterator[Setting]:
    fields = {field.name: field for field in dataclasses.fields(settings_class)}
    for name, hint in hints_of(settings_class).items():
        nested = group_class(hint)
        if nested is None:
            yield Setting(name, hint, fields[name], group)
        else:
            yield from _walk(nested, name)


def _by_field(settings_class: type[Settings], values: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a class's constructor from flat values; `before` holds groups to start from."""
    arguments: dict[str, Any] = {}
    of_groups: dict[str, dict[str, Any]] = {}
    known, hints = settings_of(settings_class), hints_of(settings_class)
    for name, value in values.items():
        if name in hints and (isinstance(value, Settings) or name not in known):  # groups may be named like values
            arguments[name] = value
        elif name not in known:
            raise TypeError(f"{settings_class.__name__} has no setting {name}{nearest(name, known)}")
        elif (group := known[name].group) is None:
            arguments[name] = value
        else:
            of_groups.setdefault(group, {})[name] = value
    for group, changes in of_groups.items():
        start = arguments.get(group, before.get(group))
        arguments[group] = hints[group].of(**changes) if start is None else start.replace(**changes)
    return arguments


def checked(name: str, hint: Any, value: Any) -> Any:
    """Return a value of a setting as it is kept.

    Args:
        name: Name of the setting.
        hint: Its type, with the declared range.
        value: The value.

    Raises:
        ValueError: The value, or one of a list, has another type, is out of the range, or is none of the choices; the
            message names the flag.
        TypeError: The type is none that settings may have.
    """
    return _checked(name, hint, value, None)


def _checked(name: str, hint: Any, value: Any, limits: Range | None) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _checked(name, arguments[0], value, range_of(hint))
    if origin in (Union, UnionType):  # of a type and None
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return None if value is None else _checked(name, kind, value, None)
    if origin in (list, tuple):
        return origin(_checked(name, arguments[0], item, None) for item in _items(name, arguments[0], value))
    if origin is Literal:
        if value not in arguments:
            *others, last = map(str, arguments)
            raise ValueError(f"{flag(name)} must be {', '.join(others)} or {last}, got {value!r:.60}")
        return arguments[arguments.index(value)]
    if hint in (int, float):
        return _number(name, hint, value, limits or Range())
    if (group := group_class(hint)) is not None:
        return _of_type(group, value, f"{name} must be {group.__name__}")
    if hint is bool:
        return _of_type(bool, value, f"{flag(name)} must be True or False")
    if hint is str:
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        return _of_type(str, text, f"{flag(name)} must be a string")
    raise TypeError(f"the setting {name} is of type {hint}, for which there is no check")


def _items(name: str, hint: Any, value: Any) -> Iterable[Any]:
    """Return the items of a list; one value stands for a list of one.

    Args:
        name: Name of the setting.
        hint: Type of its items.
        value: The value.

    Raises:
        ValueError: The value has no order, as a set, or is an array of more than one dimension.
    """
    dimensions = getattr(value, "ndim", None)  # of an array or a tensor
    if isinstance(value, Set | Mapping) or (dimensions or 0) > 1:
        kind = get_args(hint)[0] if get_origin(hint) is Annotated else hint
        nouns = {int: " of integers", float: " of numbers", str: " of strings"}
        raise ValueError(f"{flag(name)} must be a list{nouns.get(kind, '')}, got {value!r:.60}")
    if dimensions == 1:
        items: list[Any] = value.tolist()
        return items
    is_list = isinstance(value, Iterable) and dimensions is None and not isinstance(value, str | bytes)
    return value if is_list else [value]


def _of_type(kind: type[Any], value: Any, expected: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{expected}, got {value!r:.60}")
    return value


def _number(name: str, kind: type[int] | type[float], value: Any, limits: Range) -> int | float:
    """Return a number of Python, also for one of numpy; ValueError, naming the flag, if it is out of the range."""
    if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
        raise ValueError(f"{flag(name)} must be {'an integer' if kind is int else 'a number'}, got {value!r:.60}")
    number = int(value) if isinstance(value, Integral) else float(value)
    if isinstance(number, float) and not math.isfinite(number):
        raise ValueError(f"{flag(name)} must be finite, got {number}")
    if kind is int and limits.maximum is None and limits.below is None and abs(number) > _LARGEST:
        raise ValueError(f"{flag(name)} must be at most {_LARGEST}, got {number}")
    if number not in limits:
        raise ValueError(f"{flag(name)} must be {limits}, got {number}")
    return number
