"""Python functions as the JSON schemas that chat templates take for tools.

The rules are those of `get_json_schema` in `transformers/utils/chat_template_utils.py`: types come from the hints,
descriptions from a docstring in Google's format, choices from "(choices: [...])" at the end of a description.
"""

import enum
import inspect
import json
import re
import types
import typing
from collections.abc import Callable
from typing import Any

_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_NAMES |= {list: "array", tuple: "array", dict: "object"}
_SCALARS = (int, float, str, bool, type(None))
_SECTION = re.compile(r"\n\s*(Args|Returns|Raises):")
_ARGUMENT = re.compile(r"(\s*)(\w+)(?:\s*\([^()]*\))?:(.*)")
_CHOICES = re.compile(r"\(choices:\s*(.*?)\)\s*$", re.IGNORECASE)


def function_schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The schema of a function: its name, description, and the types and descriptions of its parameters.

    Raises:
      ValueError: no docstring, a parameter without a type hint or a description, or a type that JSON lacks.
    """
    name, text = getattr(function, "__name__", repr(function)), inspect.getdoc(function)
    if not text:
        raise ValueError(f"function {name!r} is a tool and has no docstring; write one, or give its JSON schema")
    description, *sections = _SECTION.split("\n" + text)
    sections = dict(zip(sections[::2], sections[1::2], strict=True))
    told = _arguments(sections.get("Args", ""))
    try:
        hints = typing.get_type_hints(function)
    except (NameError, TypeError) as error:
        raise ValueError(f"the type hints of {name!r}, which is a tool, cannot be read: {error}") from error
    properties, required = {}, []
    for key, parameter in inspect.signature(function).parameters.items():
        if not properties and key in ("self", "cls") and key not in hints:
            continue
        if key not in hints or key not in told:
            lacks = "type hint" if key not in hints else "description under Args: in its docstring"
            raise ValueError(f"parameter {key!r} of function {name!r}, a tool, has no {lacks}; add it")
        schema = _type(hints[key], f"parameter {key!r} of function {name!r}")
        if choices := _CHOICES.search(told[key]):
            schema["enum"], told[key] = json.loads(choices[1]), told[key][: choices.start()].strip()
        properties[key] = schema | {"description": told[key]}
        if parameter.default is inspect.Parameter.empty:
            required.append(key)
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    schema = {"name": name, "description": description.strip(), "parameters": parameters}
    if "return" in hints:
        try:
            schema["return"] = _type(hints["return"], "the result")
        except ValueError:  # the model never makes one, and most templates do not read it
            pass
        else:
            if "Returns" in sections:
                schema["return"]["description"] = sections["Returns"].strip()
    return {"type": "function", "function": schema}


def _arguments(section: str) -> dict[str, str]:
    """Each parameter's description, by its name; lines that are indented further go on with it."""
    told, name, indent = {}, "", None
    for line in section.splitlines():
        argument = _ARGUMENT.fullmatch(line)
        if argument and indent in (None, argument[1]):
            indent, name = argument[1], argument[2]
            told[name] = argument[3].strip()
        elif name:
            told[name] = f"{told[name]} {line.strip()}".strip()
    return told


def _type(hint: Any, what: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in _NAMES:
        return {"type": _NAMES[hint]}
    if origin in _NAMES and not arguments:  # typing's bare List, Tuple and Dict
        return {"type": _NAMES[origin]}
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return _choices([member.value for member in hint], what)
    if origin is typing.Literal:
        return _choices(list(arguments), what)
    if origin in (typing.Union, types.UnionType):
        return _union(arguments, what)
    if origin is list:
        return {"type": "array", "items": _type(arguments[0], what)}
    if origin is tuple and ... not in arguments and len(arguments) > 1:
        return {"type": "array", "prefixItems": [_type(argument, what) for argument in arguments]}
    if origin is dict:
        return {"type": "object", "additionalProperties": _type(arguments[1], what)}
    raise ValueError(
        f"{what}, a tool, has type {hint!r}, which has no JSON schema; use int, float, str, bool, Literal, Enum, or "
        "lists, tuples, dicts and unions of them, or give the tool's JSON schema"
    )


def _choices(values: list[Any], what: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"{what}, a tool, has the choices {values}; numbers, strings, booleans and None are supported")
    names = list(dict.fromkeys(_NAMES[type(value)] for value in values))
    return {"type": names[0] if len(names) == 1 else names, "enum": values}


def _union(hints: tuple[Any, ...], what: str) -> dict[str, Any]:
    schemas = [_type(hint, what) for hint in hints if hint is not type(None)]
    if len(schemas) == 1:
        schema = schemas[0]
    elif all(s.keys() == {"type"} and isinstance(s["type"], str) for s in schemas):
        names = sorted({s["type"] for s in schemas})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": schemas}
    return schema | ({"nullable": True} if type(None) in hints else {})
