"""What may follow an output, as functions on the host tell it token by token, in masks over the vocabulary."""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from jaxtyping import Bool, UInt32

from ..model.tokenizer import Tokenizer


class Constraint(Protocol):
    """What may follow one output. `SamplingParams.constraint` makes one a request, and another where it is resumed.

    With llguidance (https://github.com/guidance-ai/llguidance), whose masks are packed alike, for a regular expression:

        tokenizer = LLTokenizer(model.tokenizer.backend.to_str(), eos_token=model.generation.eos_token_ids[0])
        grammar = LLMatcher.grammar_from_regex("[0-9]+ (cats|dogs)")

        class Counted:
            def __init__(self):
                self.matcher = LLMatcher(tokenizer, grammar)
            def mask(self):
                return np.frombuffer(self.matcher.compute_bitmask(), np.uint32)
            def accept(self, token):
                if not self.matcher.consume_token(token):
                    raise ValueError(self.matcher.get_error())

        rl.generate(model, prompts, rl.SamplingParams(constraint=Counted))

    An end-of-sequence token ends the output where the mask has it. What is raised ends the request, not its company.
    """

    def mask(self) -> UInt32[np.ndarray, "W"] | Bool[np.ndarray, "V"]:
        """The tokens that may come next: a bool each, or packed, token t as bit t % 32 of word t // 32.

        Tokens past the end of the mask may not, and past the vocabulary it has none. A mask without any token ends the
        output, as "stop".
        """

    def accept(self, token: int) -> None:
        """A token that the mask had is the output's next; not called for one that ends it."""


class BadWords:
    """A `Constraint`: the last token of a sequence may not follow the others.

    Args:
      words: sequences of token ids.
      text: what stands before the output, and counts as the beginning of a sequence.
      vocab_size: V.
    """

    def __init__(self, words: Sequence[Sequence[int]], text: Sequence[int], vocab_size: int):
        self._words, self._text, self._vocab_size = words, list(text), vocab_size

    def mask(self) -> Bool[np.ndarray, "V"]:
        allowed = np.ones(self._vocab_size, bool)
        for *before, last in self._words:
            if self._text[max(0, len(self._text) - len(before)) :] == before:
                allowed[last] = False
        return allowed

    def accept(self, token: int) -> None:
        self._text.append(token)


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """The token sequences of words: each as it begins a text, and as it follows a space where that is another token.

    Source: `SamplingParams.update_from_tokenizer` of `vllm/sampling_params.py`.
    """
    sequences = []
    for word in words:
        first, spaced = (tokenizer.encode(s + word.lstrip(), add_special_tokens=False) for s in ("", " "))
        sequences.append(first)
        if spaced[0] != first[0] and len(spaced) == len(first):
            sequences.append(spaced)
    return sequences


class Constraints:
    """All constraints of one request: what none of them rules out.

    Args:
      factories: what makes each.
      vocab_size: V.

    Raises:
      TypeError, ValueError: a mask of another type or size.
    """

    def __init__(self, factories: Sequence[Callable[[], Constraint]], vocab_size: int):
        self._factories, self._vocab_size = factories, vocab_size
        self._begin()

    def _begin(self) -> None:
        self._each, self._accepted = [factory() for factory in self._factories], 0
        self.mask = self._combined()

    def restart(self, output: Sequence[int]) -> None:
        """Stand after the first tokens of the output."""
        if self._accepted == len(output):
            return
        self._begin()
        for token in output:
            self.accept(token)

    def accept(self, token: int) -> None:
        """Go on to the mask after a token.

        Raises:
          ValueError: the mask did not have it.
        """
        if not self.mask[token // 32] >> np.uint32(token % 32) & 1:
            raise ValueError(
                f"token {token} was drawn, which the constraint rules out: allowed_token_ids, min_tokens, suppressed "
                "tokens or adjust rule out all others"
            )
        for constraint in self._each:
            constraint.accept(token)
        self._accepted += 1
        self.mask = self._combined()

    def _combined(self) -> UInt32[np.ndarray, "W"]:
        combined = packed(np.ones(self._vocab_size, bool))
        for constraint in self._each:
            mask = np.asarray(constraint.mask())
            mask = packed(mask) if mask.dtype == bool else mask
            if mask.dtype != np.uint32 or mask.ndim != 1:
                given = f"{mask.dtype} {list(mask.shape)}"
                raise TypeError(f"a constraint's mask is {given}; it must be bool [V] or uint32 [ceil(V / 32)]")
            if mask[combined.size :].any():
                raise ValueError(
                    f"a constraint's mask is for {32 * mask.size} tokens; the vocabulary has {self._vocab_size}"
                )
            combined[: mask.size] &= mask[: combined.size]
            combined[mask.size :] = 0
        return combined


def packed(allowed: Bool[np.ndarray, "V"]) -> UInt32[np.ndarray, "W"]:
    """Bools as bits, W = ceil(V / 32) words of them, the lowest bit first."""
    bits = np.packbits(allowed, bitorder="little")
    return np.pad(bits, (0, -len(bits) % 4)).view("<u4")
