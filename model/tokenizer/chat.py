"""Chat templates: Jinja programs of a checkpoint that make one text of a conversation."""

import datetime
import functools
import json
import re
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser

from .functions import function_schema
from .sandbox import Sandbox

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""What a message's reasoning is called: by most templates, by gpt-oss, by vLLM."""
_LENGTH = 2**20
"""Characters of a template; published ones have some ten thousand."""
_READS_TEXT = re.compile(r"arguments['\"\])]*\s+is\s+string")
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # the space tells whether the template trims the message


class ChatTemplate:
    """One compiled template.

    Args:
      source: in Jinja, which is run in a sandbox.
      name: for errors.

    Attributes:
      variables: that it reads.

    Raises:
      ValueError: it does not parse.
    """

    def __init__(self, source: str, name: str):
        self._source, self._name = source, name
        if len(source) > _LENGTH:
            raise ValueError(
                f"chat template {name!r} has {len(source):,} characters, more than the {_LENGTH:,} allowed"
            )
        try:
            self._template, self.variables = _compiled(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template {name!r} does not parse at line {error.lineno}: {error.message}"
            ) from error
        except (RecursionError, SyntaxError) as error:  # SyntaxError of the Python that Jinja makes of it
            raise ValueError(f"chat template {name!r} does not parse: it is nested too deeply") from error
        except (ValueError, OverflowError) as error:
            raise ValueError(f"chat template {name!r} does not parse: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        continued: str | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The text of a conversation.

        Args:
          messages: as `Tokenizer.apply_chat_template` takes them.
          tools: JSON schemas, or functions.
          continued: the field of the last message at whose end the text ends, or None.
          variables: what the template sees besides.

        Raises:
          ValueError: the template fails, or does not show the message to be continued.
        """
        schemas = None if tools is None else [_schema(tool) for tool in tools]
        given = [self._message(message) for message in messages]
        parsed = given if _READS_TEXT.search(self._source) else [_with_arguments(message) for message in given]
        variables = {**variables, "tools": schemas}
        if continued is not None:
            return self._continued(parsed, continued, variables)
        try:
            return self._run(parsed, variables)
        except ValueError:
            if parsed == given:
                raise
            return self._run(given, variables)  # a template that takes tool calls' arguments as JSON

    def _run(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        try:
            return _ENVIRONMENT.render(self._template, {**variables, "messages": messages})
        except Exception as error:  # of any kind: filters and tests are functions of Jinja, of json, of Python
            lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if _is_template(frame)]
            where = f" (line {lines[-1]})" if lines else ""
            said = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise ValueError(f"chat template {self._name!r} refuses these messages: {said}{where}") from error

    def _continued(self, messages: list[dict[str, Any]], field: str, variables: Mapping[str, Any]) -> str:
        last, content = messages[-1], messages[-1].get(field)
        parts = list(content) if isinstance(content, list | tuple) else []
        texts = [n for n, part in enumerate(parts) if isinstance(part, Mapping) and isinstance(part.get("text"), str)]
        if texts:
            content = parts[texts[-1]]["text"]
            parts[texts[-1]] = {**parts[texts[-1]], "text": content + _TAG}
            last = last | {field: parts}
        elif isinstance(content, str):
            fields = [name for name in _REASONING if last.get(name) == content] if field in _REASONING else [field]
            last = last | {name: content + _TAG for name in fields}
        else:
            raise ValueError(f"continue_final_message: the last message has no text {field!r} to continue")
        text = self._run([*messages[:-1], last], variables)
        before, tag, after = text.rpartition(_TAG.strip())
        if not tag or content.strip() not in text:
            raise ValueError(f"continue_final_message: chat template {self._name!r} does not show {field!r} as it is")
        return before if after.startswith(" ") else before.rstrip()

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message without the keys whose value is None, its reasoning under every name that templates read."""
        message = {key: value for key, value in message.items() if value is not None}
        reasoning = next((message[name] for name in _REASONING if name in message), None)
        if reasoning is None:
            return message
        more = {"reasoning": reasoning} if re.search(r"\breasoning\b", self._source) else {}
        return {"thinking": reasoning, **more, **message, "reasoning_content": reasoning}


def _schema(tool: Any) -> dict[str, Any]:
    if isinstance(tool, Mapping):
        return dict(tool)
    if callable(tool):
        return function_schema(tool)
    raise ValueError(f"tool {tool!r} is neither a JSON schema, which is a mapping, nor a function")


def _with_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose tool calls have their arguments as mappings, which OpenAI's interface writes as JSON."""

    def parsed(call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": parsed(call["function"])}
        try:
            value = json.loads(call["arguments"])
        except (KeyError, TypeError, ValueError):
            return call
        return {**call, "arguments": value} if isinstance(value, dict) else call

    calls = message.get("tool_calls")
    return {**message, "tool_calls": [parsed(call) for call in calls]} if isinstance(calls, list | tuple) else message


def _is_template(frame: Any) -> bool:
    return frame.f_code.co_filename == "<template>"


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training; here it only encloses its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@functools.lru_cache(16)
def _compiled(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    variables = jinja2.meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
    return _ENVIRONMENT.from_string(source), frozenset(variables)


def _environment() -> Sandbox:
    """The environment that transformers renders chat templates in, and bounds besides."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = Sandbox(
        filters={"tojson": tojson},
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


_ENVIRONMENT = _environment()
