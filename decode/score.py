"""The log-probability of every token of given texts, or of continuations of given contexts."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float32, Int32

from ..model import arguments
from ..model.loading import Model
from ..model.transformer import Component, Residual
from .prompts import each_item, encoded, is_one, whole_ids
from .sampling.layout import top_width
from .stretches import Text
from .teacher_forced import Figures, TeacherForced

Tokens = str | Sequence[int]
"""A text, or token ids."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """How likely a model finds tokens, each after those before it.

    Log-probabilities are natural, in float32, and the model's own: of temperature 1, without filters or penalties.

    Attributes:
      tokens: what is scored: a continuation, or a text without its first token, which nothing comes before.
      logprobs: of each.
      ranks: of each among the vocabulary, 1 for the likeliest; of equals the lowest id comes first.
      top_ids: the likeliest tokens in the place of each, best first, k as asked for.
      top_logprobs: and theirs.
    """

    tokens: Int32[np.ndarray, "N"]
    logprobs: Float32[np.ndarray, "N"]
    ranks: Int32[np.ndarray, "N"]
    top_ids: Int32[np.ndarray, "N k"]
    top_logprobs: Float32[np.ndarray, "N k"]

    @property
    def sum(self) -> float:
        """The log-probability of all tokens together."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def greedy(self) -> Bool[np.ndarray, "N"]:
        """Whether each token is the likeliest."""
        return self.ranks == 1


@jax.transfer_guard("allow")
@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    top=arguments.whole,
    residual=arguments.optional(arguments.function(2)),
    max_batch_size=arguments.whole,
    progress=arguments.optional(arguments.function(2)),
)
def score(
    model: Model,
    prompts: Tokens | Sequence[Tokens],
    continuations: Any = None,
    top: int = 0,
    *,
    residual: Residual | None = None,
    component: Component | None = None,
    max_batch_size: int = 64,
    kv_dtype: jax.typing.DTypeLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score] | list[Score | list[Score]]:
    """Score every token of texts but the first, or of continuations alone.

    All runs through the KV cache, in chunks of texts of like lengths, by a program for each of seven widths at most. A
    context is computed once for all continuations of it, up to its last token.

    Args:
      model: as `load_model` returns it.
      prompts: texts or token-id lists, or one of them alone. The tokenizer puts a BOS before a text where it
        does so for `generate`; that is then the first token.
      continuations: for each prompt a text or token ids, or a list of several; for one text alone just that. None
        scores the prompts. Of two texts the prompt is encoded without blanks at its end, and the continuation's tokens
        are those of both together after as many, as in lm-evaluation-harness (`_encode_pair`); else each is encoded by
        itself.
      top: how many of the likeliest tokens to list in each place.
      residual, component: as in `transformer`; the same functions, not new ones a call, or all is compiled again.
      max_batch_size: most rows of a program, and how many of the longest the cache has room for.
      kv_dtype: of cached keys and values, as `init_cache` takes it.
      progress: called now and then with the tokens scored so far and those to score in all.

    Returns:
      For each prompt its `Score`; and where it has a list of continuations, a list of theirs.

    Raises:
      TypeError, ValueError: text without a tokenizer, nothing to score or nothing before it, token ids outside the
        vocabulary, more tokens than the model takes, counts that differ, a size out of range, an unknown `kv_dtype`;
        all before any device work.
      FloatingPointError: a log-probability that is not finite, naming the prompt and the token.
    """
    if is_one(prompts):
        prompts, continuations = [prompts], None if continuations is None else [continuations]
    prompts = each_item("prompts", prompts)
    if max_batch_size < 1:
        raise ValueError(f"max_batch_size is {max_batch_size}; it must be positive")
    if not 0 <= top <= model.config.vocab_size:
        raise ValueError(f"top is {top}; it must be between 0 and {model.config.vocab_size}, the vocabulary")
    if continuations is None:
        texts = [[_text(model, f"prompt {n}", encode(model, f"prompt {n}", p), 1)] for n, p in enumerate(prompts)]
        several = [False] * len(prompts)
    else:
        continuations = each_item("continuations", continuations)
        if len(continuations) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(continuations)} continuations; give one a prompt")
        several = [not _is_one(own) for own in continuations]
        texts = [
            _pairs(model, n, prompt, own if many else [own])
            for n, (prompt, own, many) in enumerate(zip(prompts, continuations, several, strict=True))
        ]
    flat = [text for group in texts for text in group]
    if not flat:
        return [[] for _ in prompts]
    width = top_width(top, model.config.vocab_size) if top else 0
    sizes = {"max_batch_size": max_batch_size, "top": width, "residual": residual, "component": component}
    figures = TeacherForced([model], flat, [kv_dtype], **sizes).run(progress)
    scores = iter([make_score(text.targets, of_text, top) for text, of_text in zip(flat, figures, strict=True)])
    grouped = [[next(scores) for _ in group] for group in texts]
    return [group if many else group[0] for group, many in zip(grouped, several, strict=True)]


def make_score(tokens: Int32[np.ndarray, "N"], figures: Figures, top: int = 0) -> Score:
    """The record of tokens that were scored."""
    logprobs, _ = figures
    return Score(tokens, logprobs.chosen, logprobs.rank, logprobs.top_ids[:, :top], logprobs.top[:, :top])


def encode(model: Model, name: str, text: Tokens, special: bool = True) -> list[int]:
    """Token ids, of a text or as they are given, checked against the vocabulary.

    Raises:
      TypeError, ValueError: naming the text.
    """
    if isinstance(text, str):
        if model.tokenizer is None:
            raise ValueError(f"{name} is text, but the model has no tokenizer; give token ids")
        return encoded(name, model.tokenizer, text, special)
    ids, V = whole_ids(name, each_item(name, text)), model.config.vocab_size
    outside = [token for token in ids if not 0 <= token < V]
    if outside:
        raise ValueError(f"{name} has token id {outside[0]}; the vocabulary is 0 to {V - 1}")
    return ids


def _is_one(text: Any) -> bool:
    """Whether this is one text, or its token ids, and not a list of them."""
    return isinstance(text, str) or (len(text) > 0 and not isinstance(text[0], str) and np.ndim(text[0]) == 0)


def _pairs(model: Model, index: int, prompt: Tokens, continuations: Sequence[Tokens]) -> list[Text]:
    """Each continuation of a prompt after it."""
    name, texts = f"prompt {index}", []
    context = encode(model, name, prompt)
    stripped = encode(model, name, prompt.rstrip()) if isinstance(prompt, str) else context
    for n, continuation in enumerate(continuations):
        own = f"{name}, continuation {n}"
        if isinstance(prompt, str) and isinstance(continuation, str):
            ids = stripped + encode(model, own, prompt + continuation)[len(stripped) :]
            texts.append(_text(model, own, ids, len(stripped)))
        else:
            ids = context + encode(model, own, continuation, special=False)
            texts.append(_text(model, own, ids, len(context)))
    return texts


def _text(model: Model, name: str, ids: Sequence[int], first: int) -> Text:
    if not 1 <= first < len(ids):
        raise ValueError(
            f"{name} has {len(ids)} tokens, of which those from number {first} on are to be scored; there must be one, "
            "and one before it"
        )
    if len(ids) - 1 > model.config.max_position:
        raise ValueError(
            f"{name} has {len(ids)} tokens; the model reads {model.config.max_position} and predicts one more: cut it"
        )
    return Text(name, np.array(ids, np.int32), first)
