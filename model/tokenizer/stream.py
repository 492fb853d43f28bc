"""Text from token ids as they come."""

from collections.abc import Iterable, Sequence

from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_CONTEXT = range(4, 25)
"""How many ids before the first are decoded with it: as few as begin with a whole character."""
_UNFINISHED = 3
"""Ids that an unfinished character at the end may have: UTF-8 has four bytes at most."""


class StreamDecoder:
    """Text from token ids as they come: what `feed` returns is final, and joined up it is the text of all ids.

    Two or more tokens may make one character, and many tokenizers drop a space at the start of whatever they decode.
    So new ids are decoded together with those of the last piece, whose text is then taken off, and text that ends in
    an incomplete character waits. Only in tokenizers with byte fallback, and only where a whole character is followed
    by bytes that make none, may the joined text differ from `Tokenizer.decode`, which then replaces both.

    Args:
      tokenizer: the tokenizer.
      skip_special_tokens: as in `Tokenizer.decode`.
      context: ids that come before, such as a prompt's: the text is what follows theirs, its first space included. A
        character that they leave unfinished belongs to it whole.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._ids, self._done = self._before(list(context))  # _done: how many of _ids have had their text returned

    def feed(self, ids: Iterable[int]) -> str:
        """Add token ids and return the text that they complete, possibly none."""
        self._ids.extend(int(i) for i in ids)
        text, end = self._pending(), len(self._ids)
        if text.endswith(_REPLACEMENT):
            text, end = self._final() if end - self._done > _UNFINISHED else ("", end)
        if not text:
            return ""
        self._ids, self._done = self._ids[self._done :], end - self._done
        return text

    def flush(self) -> str:
        """Return what still waits, incomplete characters as U+FFFD, and start over."""
        text = self._pending()
        self._ids, self._done = [], 0
        return text

    def _before(self, context: list[int]) -> tuple[list[int], int]:
        """The last ids of the context, and how many of them make whole characters."""
        for unfinished in range(min(_UNFINISHED, len(context)) + 1):
            whole = context[: len(context) - unfinished]
            for count in _CONTEXT:
                if _REPLACEMENT not in self._decode(whole[-count:]):
                    return whole[-count:] + context[len(whole) :], len(whole[-count:])
                if count >= len(whole):
                    break
        return context[-_CONTEXT.start :], len(context[-_CONTEXT.start :])  # a replacement character is part of it

    def _final(self) -> tuple[str, int]:
        """Of text that ends in more ids than a character has, what no later one can change, and where its ids end."""
        ends = [len(self._ids) - unfinished for unfinished in range(1, _UNFINISHED + 1)]
        before, whole = self._decode(self._ids[: self._done]), self._decode(self._ids)
        for end in ends:
            if not (head := self._decode(self._ids[:end])).endswith(_REPLACEMENT):
                return head[len(before) :], end
        for end in reversed(ends):  # bytes that no character begins with, or goes on with
            if (head := self._decode(self._ids[:end])) + self._decode(self._ids[end:]) == whole:
                return head[len(before) :], end
        return "", self._done

    def _pending(self) -> str:
        before, after = self._decode(self._ids[: self._done]), self._decode(self._ids)
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)
