"""A sandbox for chat templates, which come from outside: they reach nothing, and end soon whatever they say."""

import contextvars
import functools
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
import jinja2.nodes
import jinja2.sandbox
import jinja2.visitor

SECONDS = 5.0
"""That a template may take; the largest conversations take some hundredths of one."""
LIMIT = 10_000_000
"""Characters of a text that a template makes, and items of a list with those inside it."""
_LARGEST = 100_000
"""Numbers that methods and filters of texts and lists take, and, in Jinja's sandbox, the length of a range."""
_DIGITS = 1_000
"""Of an integer."""

_MULTIPLY = {"expandtabs", "indent", "tojson", "translate", "urlize", "wordwrap"}
"""Methods and filters whose result may have the length of the text times that of an option."""
_WIDTH = re.compile(r"%[-#0 +]*(\*|\d{5})|%[^%a-zA-Z]*\.(\*|\d{5})|\{[^{}]*:[^{}]*(\d{5}|\{)")
"""In a format, a width that is large or an argument's."""

_deadline = contextvars.ContextVar("deadline", default=math.inf)


class Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds on time and memory.

    Loops and calls look at the clock. What makes texts and lists longer than those it is given looks at their size
    first: operators, literals, and the methods and filters that are named here.

    Args:
      filters: beside Jinja's.
      **options: of Jinja's environment.
    """

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self, filters: Mapping[str, Callable[..., Any]], **options: Any):
        super().__init__(**options)
        del self.globals["lipsum"]
        self.filters |= {"join": _join_filter, "replace": _replace_filter, **filters}
        self.filters = {name: _bounded_filter(name, filter) for name, filter in self.filters.items()}
        self.binop_table |= {"+": _add, "*": _multiply, "**": _power, "%": _modulo}

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """The text of a template; raises whatever it does, jinja2.TemplateRuntimeError where it takes too long."""
        token = _deadline.set(time.monotonic() + SECONDS)
        try:
            return template.render(variables)
        finally:
            _deadline.reset(token)

    def tick(self) -> None:
        """Raise if time is up."""
        if time.monotonic() > _deadline.get():
            raise jinja2.TemplateRuntimeError(f"it takes more than {SECONDS:g} seconds")

    @staticmethod
    def concat(parts: Iterable[str], separator: str = "") -> str:
        """The joined parts, which are as many as fit; Jinja joins its output so."""
        kept, room = [], LIMIT
        for part in parts:
            room -= len(part) + len(separator)
            if room < 0:
                raise _too_large()
            kept.append(part)
        return separator.join(kept)

    def concatenated(self, *values: Any) -> str:
        """What the operator ~ does."""
        return self.concat(map(str, values))

    def bounded(self, value: Any) -> Any:
        """A value that is not too large; bytes, whose methods are not watched, are none that a template needs."""
        if isinstance(value, list | tuple | dict):
            _fits(_size(value))
        if isinstance(value, bytes):
            raise jinja2.TemplateRuntimeError("it makes bytes")
        return value

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self.tick()
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps `format`
        value, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(value, str) and name == "join" and len(args) == 1:
            return __self.concat(args[0], value)
        if isinstance(value, str | int):
            _check(name, (value, *args, *kwargs.values()))
        return __self.bounded(super().call(__context, __obj, *args, **kwargs))

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        return _Bounds().visit(super()._parse(source, name, filename))


class _Bounds(jinja2.visitor.NodeTransformer):
    """Has loops look at the clock, and operators and literals at sizes."""

    def _call(self, method: str, arguments: list[Any], line: int) -> jinja2.nodes.Expr:
        function = jinja2.nodes.EnvironmentAttribute(method)
        return jinja2.nodes.Call(function, arguments, [], None, None).set_lineno(line)

    def visit_For(self, node: jinja2.nodes.For) -> jinja2.nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, jinja2.nodes.ExprStmt(self._call("tick", [], node.lineno)).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: jinja2.nodes.Concat) -> jinja2.nodes.Node:
        self.generic_visit(node)
        return self._call("concatenated", node.nodes, node.lineno)

    def visit_List(self, node: Any) -> jinja2.nodes.Node:
        self.generic_visit(node)
        is_target = getattr(node, "ctx", "load") != "load"
        return node if is_target else self._call("bounded", [node], node.lineno)

    visit_Tuple = visit_Dict = visit_List


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    passes_first = hasattr(function, "jinja_pass_arg")  # the environment or context, before the value

    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check(name, (*args[passes_first:], *kwargs.values()))
        result = function(*args, **kwargs)
        if isinstance(result, list | tuple | dict):
            _fits(_size(result))
        return result

    return bounded


@jinja2.pass_environment
def _join_filter(environment: Sandbox, value: Iterable[Any], d: str = "", attribute: Any = None) -> str:
    if attribute is not None:
        value = environment.call_filter("map", value, kwargs={"attribute": attribute}, context=None)
    return environment.concat(map(str, value), str(d))


def _replace_filter(s: Any, old: str, new: str, count: int | None = None) -> str:
    return str(s).replace(old, new, -1 if count is None else count)


def _check(name: str, values: tuple[Any, ...]) -> None:
    """Raise where a method or filter of a text or list may take or make too much."""
    text, *options = values or ("",)
    if any(type(option) is int and abs(option) > _LARGEST for option in options):
        raise jinja2.TemplateRuntimeError(f"{name} takes numbers up to {_LARGEST:,}")
    sizes = [option if type(option) is int else _size(option) for option in options]
    match name, options:
        case "replace", [str(old), str(new), *_]:
            _fits(len(str(text)) + str(text).count(old) * len(new))
        case (("format" | "format_map"), _):
            _formats(str(text), options)
        case _ if name in _MULTIPLY:
            _fits(_size(text) * max(sizes, default=1))


def _formats(text: str, values: Any) -> None:
    if _WIDTH.search(text):
        raise jinja2.TemplateRuntimeError(f"the format {text[:80]!r} has a width that is large or not written out")
    _fits(len(text) + (text.count("%") + text.count("{")) * _size(values))


def _add(left: Any, right: Any) -> Any:
    _fits(_size(left) + _size(right))
    return left + right


def _multiply(left: Any, right: Any) -> Any:
    for value, times in ((left, right), (right, left)):
        if isinstance(value, str | list | tuple) and isinstance(times, int):
            _fits(_size(value) * times)
    if isinstance(left, int) and isinstance(right, int):
        _fits_integer(left.bit_length() + right.bit_length())
    return left * right


def _power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int):
        _fits_integer(left.bit_length() * max(right, 0))
    return left**right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        _formats(left, right)
    return left % right


def _size(value: Any) -> int:
    """Characters and items of a value, counted up to the first beyond the limit."""
    size, waiting = 0, [value]
    while waiting and size <= LIMIT:
        value = waiting.pop()
        size += len(value) if isinstance(value, str) else 1
        if isinstance(value, list | tuple | set):
            waiting.extend(value)
        elif isinstance(value, dict):
            waiting.extend((*value.keys(), *value.values()))
    return size


def _fits(size: int) -> None:
    if size > LIMIT:
        raise _too_large()


def _fits_integer(bits: int) -> None:
    if bits > _DIGITS * math.log2(10):
        raise jinja2.TemplateRuntimeError(f"it makes an integer of more than {_DIGITS:,} digits")


def _too_large() -> jinja2.TemplateError:
    return jinja2.TemplateRuntimeError(f"it makes a text or list of more than {LIMIT:,} characters or items")
