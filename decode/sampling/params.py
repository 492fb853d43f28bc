"""What a user asks of sampling, in vLLM's names and meanings, checked when it is written down."""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, no_type_check

from ...model.arguments import unknown_argument

_FLOATS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: x >= 0, "it must be finite and at least 0; 0 decodes greedily"),
    "top_p": (lambda x: 0 < x <= 1, "it must be in (0, 1]; 1 turns it off"),
    "min_p": (lambda x: 0 <= x <= 1, "it must be in [0, 1]; 0 turns it off"),
    "repetition_penalty": (lambda x: x > 0, "it must be finite and above 0; 1 turns it off"),
    "presence_penalty": (lambda x: -2 <= x <= 2, "it must be in [-2, 2]; 0 turns it off"),
    "frequency_penalty": (lambda x: -2 <= x <= 2, "it must be in [-2, 2]; 0 turns it off"),
}
_INTS: dict[str, tuple[Callable[[int], bool], str]] = {
    "top_k": (lambda n: n >= -1, "it must be at least 1, or 0 (or -1) to turn it off"),
    "min_tokens": (lambda n: n >= 0, "it must be at least 0"),
    "n": (lambda n: n >= 1, "it must be at least 1"),
}
_INTS_OR_NONE: dict[str, tuple[Callable[[int], bool], str]] = {
    "max_tokens": (lambda n: n >= 1, "it must be at least 1, or None for as many as fit"),
    "seed": (lambda n: 0 <= n < 2**64, "it must be in [0, 2**64), or None for a new one each time"),
    "logprobs": (lambda n: n >= -1, "it must be at least 0, -1 for all tokens, or None for none at all"),
    "prompt_logprobs": (lambda n: n >= -1, "it must be at least 0, -1 for all tokens, or None for none at all"),
}
_TOKEN_IDS = ("stop_token_ids", "suppress_tokens", "begin_suppress_tokens")
_BOOLS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")


# The run-time type checker of the tests must not come before the checks below, whose errors are the interface.
@no_type_check
@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How the tokens of one request are chosen and when they end. Frozen, hashable, checked at construction.

    Numbers may be any real or integral type (NumPy's too) and are kept as Python's; `stop` and lists of token ids are
    kept as tuples, empty for None.

    Attributes:
      max_tokens: most tokens to generate; None for as many as fit in the cache.
      temperature: divides the logits; below 1e-5 is greedy: the likeliest token, after biases and penalties.
      top_k: only the k likeliest tokens are drawn from; 0 or -1 for all.
      top_p: only the likeliest tokens that together reach this probability are drawn from, in (0, 1].
      min_p: only tokens at least this many times as likely as the likeliest are drawn from, in [0, 1].
      repetition_penalty: positive logits of tokens of the prompt and the output are divided by it, others multiplied.
      presence_penalty: subtracted from the logits of tokens in the output, in [-2, 2].
      frequency_penalty: subtracted once for each time a token stands in the output, in [-2, 2].
      logit_bias: added to the logit of a token id, in [-100, 100].
      suppress_tokens: tokens that are never drawn (transformers' name, as the next).
      begin_suppress_tokens: tokens that are not drawn first.
      allowed_token_ids: the only tokens that are drawn; None for all.
      bad_words: texts that the output does not hold: of each one's tokens the last is not drawn after the others.
      constraint: called for each request, makes the `Constraint` that says before each token which may come next; with
        it, or with bad words of several tokens, the batch decodes one step a dispatch.
      seed: with it, the request draws the same tokens alone and in any batch; None draws a new one each time.
      n: samples of the prompt, which is computed once for all. Number k, from 0, is what `seed` + k gives alone.
      logprobs: how many top log probabilities to return beside the chosen token's, -1 for those of all tokens; None for
        none at all.
      prompt_logprobs: the same for each token of the prompt but the first; such a prompt is read whole, even if another
        began alike.
      stop: strings that end the output once they stand in it.
      stop_token_ids: tokens that end the output, beside the model's own end-of-sequence tokens.
      ignore_eos: go on after an end-of-sequence token.
      min_tokens: tokens before which neither end-of-sequence nor `stop_token_ids` can be drawn.
      include_stop_str_in_output: whether the text keeps the stop string that ended it.
      skip_special_tokens: whether the text leaves special tokens out.

    Raises:
      TypeError, ValueError: naming the field, its value and what it may be.

    Source: `vllm/sampling_params.py` of vllm-project/vllm, for names, meanings, defaults and ranges.
    """

    max_tokens: int | None = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] | None = None
    constraint: Callable[[], Any] | None = None
    seed: int | None = None
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True

    def __new__(cls, *args: Any, **fields: Any) -> "SamplingParams":
        for name in fields.keys() - cls.__dataclass_fields__.keys():
            raise unknown_argument("SamplingParams", name, cls.__dataclass_fields__)
        return super().__new__(cls)

    def __post_init__(self):
        for name, (allowed, remedy) in _FLOATS.items():
            self._keep(name, _float(name, getattr(self, name), allowed, remedy))
        for name, (allowed, remedy) in _INTS.items():
            self._keep(name, _int(name, getattr(self, name), allowed, remedy))
        for name, (allowed, remedy) in _INTS_OR_NONE.items():
            if getattr(self, name) is not None:
                self._keep(name, _int(name, getattr(self, name), allowed, remedy))
        if self.greedy and self.n > 1:
            raise ValueError(
                f"n is {self.n}, and temperature {self.temperature} gives one text; raise it, or leave n 1"
            )
        for name in _BOOLS:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; it must be True or False")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}; lower it or raise max_tokens"
            )
        self._keep("stop", _strings("stop", self.stop))
        if "" in self.stop:
            raise ValueError(f"stop is {self.stop!r}; an empty string would end every output, leave it out")
        self._keep("bad_words", _strings("bad_words", self.bad_words))
        if not all(map(str.strip, self.bad_words)):
            raise ValueError(f"bad_words is {self.bad_words!r}; one of them is blank, leave it out")
        for name in _TOKEN_IDS:
            self._keep(name, _token_ids(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            self._keep("allowed_token_ids", _token_ids("allowed_token_ids", self.allowed_token_ids))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty, which allows no token at all; None allows all of them")
        if self.constraint is not None and not callable(self.constraint):
            raise TypeError(
                f"constraint is {self.constraint!r}; it must be a function that makes a Constraint, or None"
            )
        self._keep("logit_bias", _logit_bias(self.logit_bias))

    def _keep(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __hash__(self) -> int:
        values = (getattr(self, field.name) for field in dataclasses.fields(self))
        return hash(tuple(frozenset(v.items()) if isinstance(v, dict) else v for v in values))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken rather than drawn, at vLLM's threshold."""
        return self.temperature < 1e-5

    def validate(self, vocab_size: int) -> None:
        """Check token ids and counts against a vocabulary.

        Raises:
          ValueError: naming the field and the ids that the model does not have.
        """
        for name in (*_TOKEN_IDS, "allowed_token_ids", "logit_bias"):
            unknown = [token for token in getattr(self, name) or () if token >= vocab_size]
            if unknown:
                raise ValueError(
                    f"{name} has token ids {unknown}; the vocabulary has {vocab_size} tokens, "
                    f"so ids must be in [0, {vocab_size})"
                )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) > vocab_size:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; the vocabulary has {vocab_size} tokens, ask for no more"
                )


def _float(name: str, value: Any, allowed: Callable[[float], bool], remedy: str) -> float:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a number")
    try:
        as_float = float(value)
    except OverflowError:  # of a huge integer
        as_float = math.inf
    if not (math.isfinite(as_float) and allowed(as_float)):
        raise ValueError(f"{name} is {value}; {remedy}")
    return as_float


def _int(name: str, value: Any, allowed: Callable[[int], bool], remedy: str) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an integer: {remedy}")
    if not allowed(int(value)):
        raise ValueError(f"{name} is {value}; {remedy}")
    return int(value)


def _token_id(name: str, value: Any) -> int:
    return _int(f"a token id of {name}", value, lambda n: n >= 0, "token ids must be at least 0")


def _strings(name: str, value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else () if value is None else value
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise TypeError(f"{name} is {value!r}; it must be a string, a sequence of strings, or None")
    return tuple(strings)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise TypeError(f"{name} is {value!r}; it must be a sequence of token ids, or None")
    return tuple(dict.fromkeys(_token_id(name, token) for token in value))


def _logit_bias(value: Any) -> dict[int, float] | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias is {value!r}; it must be a mapping of token ids to biases, or None")
    return {
        _token_id("logit_bias", token): _float(
            f"logit_bias of token {token}", bias, lambda x: -100 <= x <= 100, "it must be in [-100, 100]"
        )
        for token, bias in value.items()
    }
