"""Text in, text out: prompts to batches, batches through prefill and the decode loop, tokens to requests."""

import dataclasses
import functools
import secrets
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Int

from ..model.loading import Model
from . import buckets
from .cache import page_dtype
from .request import FinishReason, Request, RequestOutput, TokenLogprobs, with_checkpoint_rules
from .runner import Runner
from .sampling.draw import SampleLogprobs
from .sampling.params import SamplingParams

Prompts = str | Sequence[str] | Sequence[Sequence[int]]


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """New output of one request.

    Attributes:
      index: the prompt's position in the list of prompts.
      tokens: new token ids.
      text: new text; "" while it may yet become a stop string or an unfinished character.
      finish_reason: set in the request's last chunk.
      output: the whole result, in the last chunk.
    """

    index: int
    tokens: list[int]
    text: str
    finish_reason: FinishReason | None
    output: RequestOutput | None


def generate(
    model: Model,
    prompts: Prompts,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    callback: Callable[[StreamChunk], None] | None = None,
    max_batch_size: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> list[RequestOutput]:
    """Complete every prompt.

    Args:
      model: as `load_model` returns it.
      prompts: texts or token-id lists (one text alone is a list of one).
      sampling: one for all prompts, or one a prompt; None takes the model's own defaults.
      callback: called with every `StreamChunk` as it comes.
      max_batch_size: rows decoded together; more prompts run in turns.
      kv_dtype: of cached keys and values: None, a float dtype, "int8" or "fp8", as `init_cache` takes it.

    Returns:
      One output a prompt, in order. A request's tokens do not depend on what it is batched with.

    Raises:
      ValueError: an empty prompt, token ids outside the vocabulary, a prompt as long as the model's longest sequence,
        stop strings without a tokenizer, an unknown `kv_dtype`; all before any device work.
    """
    outputs: dict[int, RequestOutput] = {}
    for chunk in stream(model, prompts, sampling, max_batch_size=max_batch_size, kv_dtype=kv_dtype):
        if callback is not None:
            callback(chunk)
        if chunk.output is not None:
            outputs[chunk.index] = chunk.output
    return [outputs[index] for index in range(len(outputs))]


def stream(
    model: Model,
    prompts: Prompts,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_batch_size: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> Iterator[StreamChunk]:
    """Like `generate`, but yields the output as it comes, in blocks of a few tokens a request.

    The arguments are checked when it is called, before the first chunk is asked for.
    """
    dtype = page_dtype(kv_dtype, model.config, model.mesh)
    return _stream(model, _batches(make_requests(model, prompts, sampling), max_batch_size), dtype)


def warm_up(
    model: Model,
    prompts: Prompts,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_batch_size: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> None:
    """Compile the programs that `generate` with these arguments will run, so that none is compiled while it runs."""
    for requests in _batches(make_requests(model, prompts, sampling), max_batch_size):
        runner = _start(model, requests, kv_dtype)
        runner.first(runner.prefill([request.prompt for request in requests]))
        runner.decode()


def default_sampling(model: Model, **changes: Any) -> SamplingParams:
    """The sampling that the model's generation_config.json asks for, with the named fields changed."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens")
    stated = {name: getattr(model.generation, name) for name in names}
    return SamplingParams(**{name: value for name, value in stated.items() if value is not None} | changes)


def make_requests(
    model: Model, prompts: Prompts, sampling: SamplingParams | Sequence[SamplingParams] | None
) -> list[Request]:
    """Check and tokenize prompts: everything that can be refused is refused here, before any device work."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if sampling is None:
        sampling = default_sampling(model)
    params = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != len(prompts):
        raise ValueError(f"got {len(prompts)} prompts and {len(params)} SamplingParams; give one, or one a prompt")
    rows = zip(prompts, params, _new_seeds(len(prompts)), strict=True)
    return [_request(model, index, *row) for index, row in enumerate(rows)]


def _new_seeds(count: int) -> list[int]:
    seeds = np.array([secrets.randbits(32) for _ in range(count)], np.uint32)
    if jax.process_count() > 1:  # every process must run the same request
        seeds = multihost_utils.broadcast_one_to_all(seeds)
    return seeds.tolist()


def _request(model: Model, index: int, prompt: str | Sequence[int], params: SamplingParams, seed: int) -> Request:
    config = model.config
    if len(prompt) == 0:
        raise ValueError(f"prompt {index} is empty; give it at least one token")
    if isinstance(prompt, str):
        if model.tokenizer is None:
            raise ValueError(f"prompt {index} is text, but the model has no tokenizer; give token ids")
        tokens = model.tokenizer.encode(prompt)
    else:
        tokens = [int(token) for token in prompt]
    outside = [token for token in tokens if not 0 <= token < config.vocab_size]
    if outside:
        raise ValueError(f"prompt {index} has token id {outside[0]}; the vocabulary is 0 to {config.vocab_size - 1}")
    room = config.max_position - len(tokens)
    if room <= 0:
        raise ValueError(
            f"prompt {index} has {len(tokens)} tokens; the model takes {config.max_position} and at least one must be "
            "left to generate: shorten the prompt"
        )
    if params.stop and model.tokenizer is None:
        raise ValueError("stop strings need a tokenizer, and the model has none; use stop_token_ids")
    params.validate(config.vocab_size)
    if params.max_tokens is not None and params.max_tokens > room:
        _say_once(
            f"prompt {index} has {len(tokens)} tokens of the {config.max_position} that the model takes: it ends after "
            f"{room} new ones, not after max_tokens {params.max_tokens}"
        )
    return Request(
        prompt=tokens,
        params=with_checkpoint_rules(params, model),
        max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
        seed=seed if params.seed is None else params.seed,
        eos_token_ids=model.generation.eos_token_ids,
        tokenizer=model.tokenizer,
    )


@functools.lru_cache(256)
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=5)


def _batches(requests: list[Request], max_batch_size: int) -> list[list[Request]]:
    if max_batch_size <= 0:
        raise ValueError(f"max_batch_size is {max_batch_size}; it must be positive")
    return [requests[first : first + max_batch_size] for first in range(0, len(requests), max_batch_size)]


def _stream(model: Model, batches: list[list[Request]], kv_dtype: jnp.dtype) -> Iterator[StreamChunk]:
    first = 0
    for requests in batches:
        for request in requests:
            request.start_clock()
        runner = _start(model, requests, kv_dtype)
        made = _to_host(requests, *runner.first(runner.prefill([r.prompt for r in requests])))
        while True:
            running = [(row, request) for row, request in enumerate(requests) if not request.finished]
            for row, request in running:
                before = len(request.tokens)
                for token, logprobs in made[row]:
                    request.push(token, logprobs)
                yield StreamChunk(
                    index=first + row,
                    tokens=request.tokens[before:],
                    text=request.take_text(),
                    finish_reason=request.finish_reason,
                    output=request.output() if request.finished else None,
                )
            if all(request.finished for request in requests):
                break
            texts = [[] if r.finished else r.prompt + r.tokens for r in requests] if runner.reads_again else ()
            made = _to_host(requests, *runner.decode(texts))
        first += len(requests)


def _start(model: Model, requests: Sequence[Request], kv_dtype: jax.typing.DTypeLike | None) -> Runner:
    """A runner with room for a batch, which its prompts have not passed yet."""
    totals = [len(r.prompt) + r.max_tokens for r in requests]
    rows, length = buckets.batch_bucket(len(requests)), buckets.cache_bucket(max(totals))
    runner = Runner(model, rows, length, kv_dtype=kv_dtype)
    runner.begin([r.prompt for r in requests], totals)
    runner.sample_with([r.params for r in requests], [r.prompt for r in requests], [r.seed for r in requests])
    return runner


def _to_host(
    requests: Sequence[Request], tokens: Int[Array, "N B"], logprobs: SampleLogprobs | None
) -> list[list[tuple[int, TokenLogprobs | None]]]:
    """New tokens by row, with their log-probabilities where asked for."""
    tokens, logprobs = jax.device_get((tokens, logprobs))
    return [
        [
            (token, _token_logprobs(logprobs, step, row, token, request.params.logprobs))
            for step, token in enumerate(tokens[:, row].tolist())
        ]
        for row, request in enumerate(requests)
    ]


def _token_logprobs(
    logprobs: SampleLogprobs | None, step: int, row: int, token: int, count: int | None
) -> TokenLogprobs | None:
    if logprobs is None or count is None:
        return None
    ids, values = logprobs.top_ids[step, row, :count], logprobs.top[step, row, :count]
    return TokenLogprobs(
        token=token,
        logprob=float(logprobs.chosen[step, row]),
        rank=int(logprobs.rank[step, row]),
        top={int(i): float(v) for i, v in zip(ids, values, strict=True)},
    )
