"""What callers ask for: prompts and sampling, checked and tokenized before any device work."""

import contextlib
import dataclasses
import functools
import numbers
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..model.fields import shortened
from ..model.loading import Model
from ..model.tokenizer import Tokenizer
from .constraints import BadWords, Constraints, bad_word_tokens
from .request import Request
from .sampling.params import SamplingParams

Prompt = str | Sequence[int] | np.ndarray | jax.Array | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""

Prompts = Prompt | Sequence[Prompt]

_PROMPT = "a text, token ids, or the messages of a chat"


def default_sampling(model: Model, **changes: Any) -> SamplingParams:
    """The sampling that the model's generation_config.json asks for, with the named fields changed."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
    stated = {name: getattr(model.generation, name) for name in names}
    return SamplingParams(**{name: value for name, value in stated.items() if value is not None} | changes)


def make_requests(
    model: Model, prompts: Prompts, sampling: SamplingParams | Sequence[SamplingParams] | None
) -> list[Request]:
    """Check and tokenize prompts: everything that can be refused is refused here, before any device work."""
    prompts = each_prompt(prompts)
    if sampling is None:
        sampling = default_sampling(model)
    if not isinstance(sampling, SamplingParams | Sequence) or isinstance(sampling, str):
        raise TypeError(f"sampling is {shortened(sampling)}; it must be SamplingParams, a list of them, or None")
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts and {len(params)} SamplingParams; give one, or one a prompt")
    rows = zip(prompts, params, _new_seeds(len(prompts)), strict=True)
    return [make_request(model, index, *row) for index, row in enumerate(rows)]


def each_prompt(prompts: Prompts) -> list[Prompt]:
    """Several prompts, or one alone in a list of its own."""
    return [prompts] if is_one(prompts) else each_item("prompts", prompts)


def is_one(prompts: Prompts) -> bool:
    """Whether this is a prompt by itself: a text, token ids, or the messages of a chat."""
    if isinstance(prompts, np.ndarray | jax.Array):
        return prompts.ndim == 1
    first = prompts[0] if isinstance(prompts, Sequence) and not isinstance(prompts, bytes) and len(prompts) else None
    return isinstance(prompts, str) or isinstance(first, Mapping) or _is_id(first)


def _is_id(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _new_seeds(count: int) -> list[int]:
    seeds = np.array([secrets.randbits(32) for _ in range(count)], np.uint32)
    if jax.process_count() > 1:  # every process must run the same request
        seeds = multihost_utils.broadcast_one_to_all(seeds)
    return seeds.tolist()


def make_request(
    model: Model,
    index: int,
    prompt: Prompt,
    params: SamplingParams | None = None,
    seed: int | None = None,
    *,
    max_length: int | None = None,
) -> Request:
    """One request, the first of its `samples`, checked and tokenized; errors name it by `index`.

    Args:
      model: as `load_model` returns it.
      index: the prompt's position.
      prompt: a text, token ids, or the messages of a chat.
      params: None for the model's own defaults.
      seed: where params have none; None draws one.
      max_length: most positions, where these are fewer than the model takes.
    """
    config = model.config
    params = default_sampling(model) if params is None else params
    if not isinstance(params, SamplingParams):
        raise TypeError(f"the sampling of prompt {index} is {shortened(params)}; it must be SamplingParams, or None")
    (seed,) = _new_seeds(1) if seed is None else (seed,)
    longest = min(max_length or config.max_position, config.max_position)
    tokens = _tokens(model, index, prompt)
    outside = [token for token in tokens if not 0 <= token < config.vocab_size]
    if outside:
        raise ValueError(f"prompt {index} has token id {outside[0]}; the vocabulary is 0 to {config.vocab_size - 1}")
    who = "the model" if longest == config.max_position else "the engine"
    room = longest - len(tokens)
    if room <= 0:
        raise ValueError(
            f"prompt {index} has {len(tokens)} tokens; {who} takes {longest} and at least one must be left to "
            "generate: shorten the prompt"
        )
    if params.stop and model.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
    if params.bad_words and model.tokenizer is None:
        raise ValueError("bad_words need a tokenizer, and the model has none; use suppress_tokens or a constraint")
    params.validate(config.vocab_size)
    every = {name: config.vocab_size for name in ("logprobs", "prompt_logprobs") if getattr(params, name) == -1}
    params = dataclasses.replace(params, **every)
    if params.max_tokens is not None and params.max_tokens > room:
        _say_once(
            f"prompt {index} has {len(tokens)} tokens of the {longest} that {who} takes: it ends "
            f"after {room} new ones, not after max_tokens {params.max_tokens}"
        )
    params = with_checkpoint_rules(params, model)
    allowed, not_first = params.allowed_token_ids, {*params.suppress_tokens, *params.begin_suppress_tokens}
    if allowed is not None and not_first.issuperset(allowed):
        raise ValueError(f"all allowed_token_ids of prompt {index} are suppressed or bad words; allow others too")
    params = dataclasses.replace(params, seed=seed if params.seed is None else params.seed)
    samples = [
        Request(
            prompt=tokens,
            params=own,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            seed=own.seed,
            eos_token_ids=model.generation.eos_token_ids,
            tokenizer=model.tokenizer,
            constraints=_constraints(index, params, tokens, model),
        )
        for own in _each_sample(params)
    ]
    for request in samples:
        request.samples = samples
    return samples[0]


def _each_sample(params: SamplingParams) -> list[SamplingParams]:
    """Of each of the `n` samples: its seed, by vLLM's rule (`vllm/v1/engine/parallel_sampling.py`); only the first
    scores the prompt."""
    others = [
        dataclasses.replace(params, seed=(params.seed + sample) % 2**64, prompt_logprobs=None)
        for sample in range(1, params.n)
    ]
    return [params, *others]


def _bad_words(params: SamplingParams, model: Model) -> list[list[int]]:
    return bad_word_tokens(params.bad_words, model.tokenizer) if params.bad_words else []


def _constraints(index: int, params: SamplingParams, prompt: Sequence[int], model: Model) -> Constraints | None:
    """What must be asked before each token: bad words of several tokens, and the request's own constraint."""
    V, factories = model.config.vocab_size, [] if params.constraint is None else [params.constraint]
    # A word of the checkpoint's may begin in the prompt (transformers), one of the request's only in the output (vLLM).
    for words, text in ((model.generation.bad_words, prompt), (_bad_words(params, model), ())):
        words = [list(word) for word in words if len(word) > 1 and max(word) < V]
        if words:
            factories.append(functools.partial(BadWords, words, text, V))
    if not factories:
        return None
    constraints = Constraints(factories, V)
    if not constraints.mask.any():
        raise ValueError(f"the constraint of prompt {index} allows no token to begin with; allow one")
    return constraints


def _tokens(model: Model, index: int, prompt: Prompt) -> list[int]:
    prompt = prompt if isinstance(prompt, str) else each_item(f"prompt {index}", prompt)
    if len(prompt) == 0:
        raise ValueError(f"prompt {index} is empty; give it at least one token")
    if not isinstance(prompt, str) and not isinstance(prompt[0], Mapping):
        return whole_ids(f"prompt {index}", prompt)
    if model.tokenizer is None:
        kind = "text" if isinstance(prompt, str) else "a chat"
        raise ValueError(f"prompt {index} is {kind}, but the model has no tokenizer; give token ids")
    tokens = encoded(f"prompt {index}", model.tokenizer, prompt)
    if not tokens:
        raise ValueError(f"prompt {index} has no tokens: the tokenizer makes none of {shortened(prompt)}; write more")
    return tokens


def each_item(name: str, prompt: Any) -> list[Any]:
    """What a prompt that is no text, or a list of prompts, holds."""
    if isinstance(prompt, np.ndarray | jax.Array):
        prompt = np.asarray(prompt).tolist()
    if not isinstance(prompt, Iterable) or isinstance(prompt, Mapping | bytes | str):
        several = ", or a list of such" if name == "prompts" else ""
        raise TypeError(f"{name} is {shortened(prompt)}; it must be {_PROMPT}{several}")
    return list(prompt)


def whole_ids(name: str, ids: Sequence[Any]) -> list[int]:
    """Token ids as Python's integers; TypeError for what is none."""
    for token in ids:
        if not _is_id(token) and not (isinstance(token, jax.Array) and token.shape == () and token.dtype.kind in "iu"):
            raise TypeError(f"{name} has {shortened(token)} among its token ids; they must be whole numbers")
    return [int(token) for token in ids]


def encoded(name: str, tokenizer: Tokenizer, prompt: Prompt, special: bool = True) -> list[int]:
    """Token ids of a text or a chat; errors say whose."""
    with naming(name):
        if isinstance(prompt, str):
            return tokenizer.encode(prompt, add_special_tokens=special)
        return tokenizer.apply_chat_template(prompt, tokenize=True)


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Have a tokenizer's errors say whose text it is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


@functools.lru_cache(256)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def with_checkpoint_rules(params: SamplingParams, model: Model) -> SamplingParams:
    """The params of a request with what the checkpoint's own files ask of every one.

    Tokens that are never made, or not made first, are suppressed, as are bad words of one token; the checkpoint's stop
    strings are added, unless the request ignores the ends of texts.
    """
    rules, V = model.generation, model.config.vocab_size
    words = [*rules.bad_words, *_bad_words(params, model)]
    never = [*rules.suppress_tokens, *(word[0] for word in words if len(word) == 1)]
    never, not_first = ([token for token in tokens if token < V] for tokens in (never, rules.begin_suppress_tokens))
    stop = params.stop
    if model.tokenizer is not None and not params.ignore_eos:
        stop = tuple(dict.fromkeys((*stop, *rules.stop_strings)))
    return dataclasses.replace(
        params,
        suppress_tokens=(*params.suppress_tokens, *never),
        begin_suppress_tokens=(*params.begin_suppress_tokens, *not_first),
        stop=stop,
    )
