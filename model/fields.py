"""What JSON from outside may hold: every field that is read is declared, and checked where it is read."""

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

LARGEST = 2**31 - 1
"""Of whole numbers that become sizes, positions or ids, which programs count in int32."""

HALF = re.compile("[\ud800-\udfff]")
"""Half a character, which JSON and Python can write and nothing else takes."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file, what was found and what to do."""


class Kind(NamedTuple):
    """What a field may be.

    Attributes:
      allowed: in words, for errors.
      read: (value, file, the field's name) -> the value as it is used; raises `CheckpointError`.
    """

    allowed: str
    read: Callable[[Any, str, str], Any]


class Fields:
    """The fields of a JSON object. Null counts as absent, but for defaults, which it switches off.

    Args:
      values: the object.
      declared: the kind of every field that is read; to read another is a mistake of the program, a KeyError.
      file: where it comes from, for errors.
      within: what leads to the object in its file, such as "rope_scaling.".
    """

    def __init__(self, values: Mapping[str, Any], declared: Mapping[str, Kind], file: str, within: str = ""):
        self.values, self.file = values, file
        self._declared, self._within = declared, within

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __bool__(self) -> bool:
        return bool(self.values)

    def __getitem__(self, key: str) -> Any:
        """The field's value, which has to be there."""
        kind, value = self._declared[key], self.values.get(key)
        if value is None:
            raise CheckpointError(f"{self.file} has no {self.name(key)!r}, expected {kind.allowed}")
        return kind.read(value, self.file, self.name(key))

    def get(self, key: str, default: Any = None) -> Any:
        """The field's value, or the default where it is absent."""
        kind, value = self._declared[key], self.values.get(key)
        return default if value is None else kind.read(value, self.file, self.name(key))

    def object(self, key: str) -> "Fields":
        """The fields of an object, none where it is absent."""
        return self[key] if key in self else self._declared[key].read({}, self.file, self.name(key))

    def name(self, key: str) -> str:
        """A field by what leads to it."""
        return self._within + key

    def only(self, key: str, values: Iterable[Any], reason: str) -> None:
        """Raise `CheckpointError` unless a field is absent or has one of the values that are supported."""
        value = self.get(key)
        if value is not None and value not in values:
            what = f"{self.file}: {self.name(key)} is {shortened(value)}"
            raise CheckpointError(f"{what}, which is not supported: {reason}")

    def __or__(self, changes: Mapping[str, Any]) -> "Fields":
        return Fields({**self.values, **changes}, self._declared, self.file, self._within)

    def __ror__(self, defaults: Mapping[str, Any]) -> "Fields":
        return Fields({**defaults, **self.values}, self._declared, self.file, self._within)


def shortened(value: Any) -> str:
    """A value for an error."""
    return _SHORT.repr(value)


def _refusal(value: Any, file: str, name: str, allowed: str) -> CheckpointError:
    return CheckpointError(f"{file}: {name} is {shortened(value)}, expected {allowed}")


def kind(allowed: str, convert: Callable[[Any], Any]) -> Kind:
    """What `convert` does not make None."""

    def read(value: Any, file: str, name: str) -> Any:
        converted = convert(value)
        if converted is None:
            raise _refusal(value, file, name, allowed)
        return converted

    return Kind(allowed, read)


def whole(low: int = 1, high: int = LARGEST) -> Kind:
    """A whole number, which JSON may write as 50.0."""

    def convert(value: Any) -> int | None:
        value = int(value) if type(value) is float and value.is_integer() else value
        return value if type(value) is int and low <= value <= high else None

    return kind(f"a whole number from {low:,} to {high:,}", convert)


def number(low: int | float, high: int | float, *, above: bool = False) -> Kind:
    """A number from `low`, or above it, to `high`."""

    def convert(value: Any) -> float | None:
        allowed = type(value) in (int, float) and low <= value <= high and not (above and value == low)
        return float(value) if allowed else None

    return kind(f"a number {'above' if above else 'from'} {low:g} {'up ' if above else ''}to {high:g}", convert)


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and not HALF.search(value) else None


flag = kind("true or false", lambda value: value if type(value) is bool else None)
text = kind("a text", _text)
some_text = kind("a text that is not empty", lambda value: _text(value) or None)
anything = kind("any value", lambda value: value)


def one_of(*values: str) -> Kind:
    """One of some texts."""
    allowed = f"one of {', '.join(values)}"
    return kind(allowed, lambda value: value if isinstance(value, str) and value in values else None)


def any_of(*kinds: Kind) -> Kind:
    """What one of the kinds allows."""
    allowed = " or ".join(kind.allowed for kind in kinds)

    def read(value: Any, file: str, name: str) -> Any:
        for one in kinds:
            try:
                return one.read(value, file, name)
            except CheckpointError:
                continue
        raise _refusal(value, file, name, allowed)

    return Kind(allowed, read)


def list_of(item: Kind, least: int = 0, most: int | None = None, *, one: bool = False) -> Kind:
    """A list of so many items; `one` allows an item by itself too, as a list of it."""
    size = "" if most is None else f"{most} times " if least == most else f"at most {most} times "
    allowed = f"a list of {size}{item.allowed}" + (f", or {item.allowed}" if one else "")
    check = kind(allowed, lambda v: v if isinstance(v, list | tuple) and least <= len(v) <= (most or len(v)) else None)

    def read(value: Any, file: str, name: str) -> tuple[Any, ...]:
        if one and not isinstance(value, list | tuple):
            return (item.read(value, file, name),)
        values = check.read(value, file, name)
        return tuple(item.read(v, file, f"{name}[{index}]") for index, v in enumerate(values))

    return Kind(allowed, read)


def object_of(item: Kind, least: int = 0) -> Kind:
    """An object whose fields, whatever their names, are all of a kind."""
    allowed = f"an object, each field {item.allowed}"
    check = kind(allowed, lambda value: value if isinstance(value, Mapping) and len(value) >= least else None)

    def read(value: Any, file: str, name: str) -> dict[str, Any]:
        return {key: item.read(v, file, f"{name}.{key}") for key, v in check.read(value, file, name).items()}

    return Kind(allowed, read)


def an_object(declared: Mapping[str, Kind]) -> Kind:
    """An object as its fields."""
    check = kind("an object", lambda value: value if isinstance(value, Mapping) else None)

    def read(value: Any, file: str, name: str) -> Fields:
        return Fields(check.read(value, file, name), declared, file, f"{name}.")

    return Kind("an object", read)
