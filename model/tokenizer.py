"""Text <-> token ids, chat templates, and text from a stream of ids."""

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from .checkpoint.files import CheckpointError, read_optional

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that chat templates see by name."""

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A `tokenizers` tokenizer with its special tokens and chat templates.

    Args:
      backend: the tokenizer itself; truncation and padding that its file asks for are switched off.
      special_tokens: text of the special tokens that the checkpoint names, by keys of `SPECIAL_TOKENS`.
      chat_templates: Jinja templates by name; "default" is the one used where none is asked for.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ):
        # Left on, they would cut or pad prompts silently.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included; a model's vocabulary may be padded beyond it."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the token that begins a text, or None where the checkpoint names none."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, or None where the checkpoint names none."""
        return self._special_id("eos_token")

    def _special_id(self, name: str) -> int | None:
        return self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: special tokens written out in it become their ids.
          add_special_tokens: whether the tokenizer adds those it puts around a text, such as a leading BOS. Pass
            False for text that `apply_chat_template` made, which has them already.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that no token has, such as those of a padded vocabulary, give nothing."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, to be encoded with `add_special_tokens=False`.

        Args:
          messages: mappings with "role" and "content", and whatever else the template reads; keys whose value is None
            count as absent.
          add_generation_prompt: whether to end with the header of the assistant's turn.
          template: the name of one of `chat_templates`; by default "tool_use" where tools are given and the
            checkpoint has it, else "default".
          tools: JSON schemas of functions that the model may call.
          **variables: further variables for the template, such as `enable_thinking`.

        Raises:
          ValueError: no such template, no message, or a template that does not parse or refuses the messages.
        """
        if not messages or isinstance(messages, str) or not all(isinstance(m, Mapping) for m in messages):
            raise ValueError(
                f'messages are {messages!r}; expected at least one mapping such as {{"role": "user", "content": "Hi"}}'
            )
        name = template or ("tool_use" if tools is not None and "tool_use" in self.chat_templates else "default")
        if name not in self.chat_templates:
            known = f"it has {', '.join(sorted(self.chat_templates))}" if self.chat_templates else "it has none"
            raise ValueError(
                f"this tokenizer has no chat template {name!r} ({known}); for a chat model, put its "
                "chat_template.jinja beside tokenizer.json, else pass plain text to encode"
            )
        given = {
            "messages": [{key: value for key, value in m.items() if value is not None} for m in messages],
            "tools": None if tools is None else list(tools),
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            compiled = _ENVIRONMENT.from_string(self.chat_templates[name])
            return compiled.render({**given, **self.special_tokens, **variables})
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(
                f"chat template {name!r} does not parse at line {error.lineno}: {error.message}"
            ) from error
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template {name!r} refuses these messages: {error}") from error


class StreamDecoder:
    """Text from token ids as they come: what `feed` returns is final, and joined up it is the text of all ids.

    Two or more tokens may make one character, and many tokenizers drop a space at the start of whatever they decode.
    So new ids are decoded together with those of the last piece, whose text is then taken off, and text that ends in
    an incomplete character waits. Only in tokenizers with byte fallback, and only where a whole character is followed
    by bytes that make none, may the joined text differ from `Tokenizer.decode`, which then replaces both.

    Args:
      tokenizer: the tokenizer.
      skip_special_tokens: as in `Tokenizer.decode`.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids: list[int] = []
        self._done = 0  # how many of _ids have had their text returned

    def feed(self, ids: Iterable[int]) -> str:
        """Add token ids and return the text that they complete, possibly none."""
        self._ids.extend(int(i) for i in ids)
        text = self._pending()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._ids = self._ids[self._done :]
        self._done = len(self._ids)
        return text

    def flush(self) -> str:
        """Return what still waits, incomplete characters as U+FFFD, and start over."""
        text = self._pending()
        self._ids, self._done = [], 0
        return text

    def _pending(self) -> str:
        before, after = self._decode(self._ids[: self._done]), self._decode(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None where it has no tokenizer.json.

    Raises:
      CheckpointError: a file that does not parse, naming it.
    """
    file = directory / "tokenizer.json"
    if not file.exists():
        return None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # what the Rust side raises is a bare Exception
        raise CheckpointError(f"{file} is no tokenizer that `tokenizers` reads ({error}); fetch it again") from error
    config = read_optional(directory / "tokenizer_config.json")
    stated = dict(config)
    if "added_tokens_decoder" not in config:
        # As in transformers: the older special_tokens_map.json counts only beside a config that lacks the newer list.
        stated.update(read_optional(directory / "special_tokens_map.json"))
    return Tokenizer(backend, _special_tokens(stated), _chat_templates(directory, config))


def _special_tokens(stated: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in SPECIAL_TOKENS:
        value = stated.get(name)
        if isinstance(value, Mapping):  # a serialized AddedToken
            value = value.get("content")
        if isinstance(value, str):
            found[name] = value
    return found


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").exists():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    match config.get("chat_template"):
        case None:
            return {}
        case str(template):
            return {"default": template}
        case [*named] if all(isinstance(t, Mapping) and {"name", "template"} <= set(t) for t in named):
            return {t["name"]: t["template"] for t in named}
        case other:
            raise CheckpointError(
                f"{directory / 'tokenizer_config.json'}: chat_template is a {type(other).__name__}, expected a "
                "template or a list of objects with name and template"
            )


class _GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's text for training; here it only encloses its body."""

    tags = {"generation"}  # noqa: RUF012 - as the base class declares it

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _environment() -> jinja2.Environment:
    """The environment that transformers renders chat templates in; templates are untrusted, hence the sandbox."""

    def raise_exception(message: str):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Jinja's own filter escapes HTML.
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(format: str) -> str:
        return datetime.datetime.now().strftime(format)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment


_ENVIRONMENT = _environment()
