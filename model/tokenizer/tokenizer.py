"""A tokenizer with its special tokens and chat templates."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, no_type_check

import tokenizers

from ..fields import HALF, shortened
from .chat import ChatTemplate

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every checkpoint may name; it may name others too, such as "image_token"."""


@contextlib.contextmanager
def backend_errors(what: str) -> Iterator[None]:
    """Turn what the Rust side raises, bare exceptions and panics, which are not even those, into ValueErrors."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{what}: {error}") from error


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {shortened(value)}; it must be True or False")


class Tokenizer:
    """A `tokenizers` tokenizer with its special tokens and chat templates.

    Args:
      backend: the tokenizer itself; truncation and padding that its file asks for are switched off.
      special_tokens: text of the special tokens that the checkpoint names, by their names, such as "eos_token".
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
        return self.special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the token that ends a text, or None where the checkpoint names none."""
        return self.special_id("eos_token")

    @functools.cached_property
    def special_token_ids(self) -> dict[str, int]:
        """Ids of all special tokens, which `decode` leaves out, by their text."""
        return {token.content: id for id, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def special_id(self, name: str) -> int | None:
        """Id of the special token of that name, or None where the checkpoint has none."""
        return self.backend.token_to_id(self.special_tokens[name]) if name in self.special_tokens else None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text.

        Args:
          text: special tokens written out in it become their ids.
          add_special_tokens: whether the tokenizer adds those it puts around a text, such as a leading BOS; a text that
            begins with that BOS itself, as many chat templates' do, gets no second one.

        Raises:
          ValueError: half a character (a surrogate) in the text, or words that the tokenizer has no tokens for.
        """
        encoding = self.encoding(text, add_special_tokens)
        ids, was_added = encoding.ids, encoding.special_tokens_mask
        return ids[1:] if len(ids) > 1 and ids[0] == ids[1] and was_added[:2] == [1, 0] else ids

    def encoding(self, text: str, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """Token ids of a text and where each lies in it; errors as of `encode`."""
        if not isinstance(text, str):
            raise TypeError(f"text is {shortened(text)}, of type {type(text).__name__}; it must be a string")
        _check_flag("add_special_tokens", add_special_tokens)
        if half := HALF.search(text):
            byte = ord(half[0]) - 0xDC00  # as Python keeps what it could not decode
            what = f"byte 0x{byte:x}, which is not UTF-8" if 0x80 <= byte <= 0xFF else f"half a character, {half[0]!r}"
            raise ValueError(f"the text has {what}, at {half.start()}; give whole characters")
        with backend_errors(f"the tokenizer cannot encode {text:.50}{'...' if len(text) > 50 else ''}"):
            return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that no token has, such as those of a padded vocabulary, give nothing."""
        _check_flag("skip_special_tokens", skip_special_tokens)
        if isinstance(ids, str | Mapping) or not isinstance(ids, Iterable):
            raise TypeError(f"ids is {shortened(ids)}; it must be token ids")
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise TypeError(f"ids is {shortened(ids)}; each must be a whole number") from None
        if any(not 0 <= i < 2**32 for i in ids):
            raise ValueError(f"ids is {shortened(ids)}; token ids are at least 0, and counted in 32 bits")
        with backend_errors(f"the tokenizer cannot decode {shortened(ids)}"):
            return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    @no_type_check  # what is wrong with an argument is told in words
    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool | None = None,
        continue_final_message: bool | str = False,
        tokenize: bool = False,
        *,
        return_dict: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> str | list[int] | dict[str, list[int]] | list[Any]:
        """The text of a conversation, to be encoded with `add_special_tokens=False`, or its token ids.

        The arguments are those of transformers, with other defaults where a text for `generate` needs others.

        Args:
          conversation: messages, which are mappings with "role" and "content" and whatever else the template reads; or
            a list of conversations, for a list of results. Keys whose value is None count as absent. Arguments of tool
            calls may be mappings or JSON; reasoning may be called "reasoning_content", "reasoning" or "thinking".
          tools: that the model may call: JSON schemas, or functions with type hints and docstrings in Google's format.
          documents: mappings with "title" and "text".
          chat_template: the name of one of `chat_templates`, or a template itself; by default "tool_use" where tools
            are given and the checkpoint has it, else "default".
          add_generation_prompt: whether to end with the header of the assistant's turn; by default unless the final
            message is to be continued.
          continue_final_message: whether to end where the last message's content does, for the model to go on with; a
            name is that of another field, such as "reasoning_content".
          tokenize: whether to return token ids.
          return_dict: whether to return them as {"input_ids": ids, "attention_mask": ones}.
          chat_template_kwargs: further variables for the template, vLLM's way of passing them.
          **variables: further variables for the template, such as `enable_thinking`.

        Raises:
          ValueError: no such template, no message, a variable that the template does not read, or a template that does
            not parse or fails, naming it and the line.
        """
        _check_flag("tokenize", tokenize)
        if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, str | bytes)):
            raise TypeError(f"tools is {shortened(tools)}; it must be a list of JSON schemas or functions, or None")
        batch = list(conversation) if isinstance(conversation, Sequence) else []
        if batch and all(isinstance(one, list | tuple) for one in batch):
            options = (tools, documents, chat_template, add_generation_prompt, continue_final_message, tokenize)
            more = {"return_dict": return_dict, "chat_template_kwargs": chat_template_kwargs, **variables}
            return [self.apply_chat_template(one, *options, **more) for one in batch]
        if not batch or not all(isinstance(message, Mapping) for message in batch):
            raise ValueError(
                f"messages are {conversation!r}; expected at least one mapping such as "
                '{"role": "user", "content": "Hi"}'
            )
        if add_generation_prompt is None:
            add_generation_prompt = not continue_final_message
        elif add_generation_prompt and continue_final_message:
            raise ValueError(
                "continue_final_message goes on with the last turn and add_generation_prompt begins another: choose one"
            )
        template = self._template(chat_template, tools)
        variables = dict(chat_template_kwargs or {}) | variables
        asked = variables | {name: value for name, value in (("tools", tools), ("documents", documents)) if value}
        if unread := sorted(asked.keys() - template.variables):
            raise ValueError(
                f"the chat template does not read {', '.join(unread)}; leave it out, or give chat_template= one that "
                f"does (it reads {', '.join(sorted(template.variables))})"
            )
        given = {"documents": documents, "add_generation_prompt": bool(add_generation_prompt)}
        field = "content" if continue_final_message is True else continue_final_message or None
        text = template.render(batch, tools, field, {**given, **self.special_tokens, **variables})
        if not tokenize:
            return text
        ids = self.encode(text, add_special_tokens=False)
        return {"input_ids": ids, "attention_mask": [1] * len(ids)} if return_dict else ids

    def _template(self, template: str | None, tools: Any) -> ChatTemplate:
        if template is not None and not isinstance(template, str):
            raise TypeError(f"chat_template is {shortened(template)}; it must be a name, a template, or None")
        name = template or ("tool_use" if tools is not None and "tool_use" in self.chat_templates else "default")
        if name in self.chat_templates:
            return ChatTemplate(self.chat_templates[name], name)
        if template is not None and ("{" in template or len(template.split()) > 1):
            return ChatTemplate(template, "chat_template")
        known = f"it has {', '.join(sorted(self.chat_templates))}" if self.chat_templates else "it has none"
        raise ValueError(
            f"this tokenizer has no chat template {name!r} ({known}); for a chat model, put its chat_template.jinja "
            "beside tokenizer.json, else pass plain text to encode"
        )
