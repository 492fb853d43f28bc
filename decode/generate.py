"""Text in, text out: every prompt through an engine of just the size."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from ..model import arguments
from ..model.loading import Model
from ..model.transformer import Component, Residual
from . import buckets
from .engine.engine import Engine
from .engine.sizes import default_cache_tokens
from .prompts import Prompts, make_requests
from .request import Request, RequestOutput, StreamChunk
from .sampling.params import SamplingParams
from .sampling.scores import Adjust


@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    callback=arguments.optional(arguments.function(1)),
    max_batch_size=arguments.whole,
    **arguments.seams,
    adjust=arguments.optional(arguments.function(2)),
)
def generate(
    model: Model,
    prompts: Prompts,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    callback: Callable[[StreamChunk], None] | None = None,
    max_batch_size: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
    residual: Residual | None = None,
    component: Component | None = None,
    adjust: Adjust | None = None,
) -> list[RequestOutput]:
    """Complete every prompt.

    Args:
      model: as `load_model` returns it.
      prompts: texts, lists of token ids, and chats, which are lists of messages, {"role": ..., "content": ...}, and to
        which the tokenizer's template is applied; or one prompt alone.
      sampling: one for all prompts, or one a prompt; None takes the model's own defaults.
      callback: called with every `StreamChunk` as it comes.
      max_batch_size: rows decoded together; more prompts run in turns.
      kv_dtype: of cached keys and values: None, a float dtype, "int8" or "fp8", as `init_cache` takes it.
      residual, component: intervene in the forward pass of every prompt, prefill and decode, as in `transformer`: what
        is made is what recomputing everything at each step would make. Static, as the next: pass the same function
        again, not an equal new one, or it compiles again.
      adjust: a pure function of the logits, as in `sample`.

    Returns:
      One output a prompt, in order. A request's tokens do not depend on what it is batched with.

    Raises:
      TypeError, ValueError: an argument of another type or out of range, a prompt that is empty or becomes no tokens,
        token ids outside the vocabulary, a prompt as long as the model's longest sequence, stop strings without a
        tokenizer, an unknown `kv_dtype`; all before any device work.
      FloatingPointError: a prompt after which the logits are not finite, naming it.
    """
    outputs: dict[int, RequestOutput] = {}
    seams = {"residual": residual, "component": component, "adjust": adjust}
    for chunk in stream(model, prompts, sampling, max_batch_size=max_batch_size, kv_dtype=kv_dtype, **seams):
        if callback is not None:
            callback(chunk)
        if chunk.output is not None:
            if chunk.output.error is not None:
                raise chunk.output.error
            outputs[chunk.index] = chunk.output
    return [outputs[index] for index in range(len(outputs))]


@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    max_batch_size=arguments.whole,
    **arguments.seams,
    adjust=arguments.optional(arguments.function(2)),
)
def stream(
    model: Model,
    prompts: Prompts,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_batch_size: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
    residual: Residual | None = None,
    component: Component | None = None,
    adjust: Adjust | None = None,
) -> Iterator[StreamChunk]:
    """Like `generate`, but yields the output as it comes, in blocks of a few tokens a request.

    The arguments are checked when it is called, before the first chunk is asked for. A request that fails ends with
    "error" for its `finish_reason`, and what failed in its output; the others go on.
    """
    requests = make_requests(model, prompts, sampling)
    seams = {"residual": residual, "component": component, "adjust": adjust}
    engine = engine_for(model, requests, max_batch_size, kv_dtype, **seams)
    for request in requests:
        engine.add(request)
    return _closing(engine)


def _closing(engine: Engine) -> Iterator[StreamChunk]:
    with engine:
        yield from engine.run()


def warm_up(
    model: Model,
    prompts: Prompts,
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    max_batch_size: int = 32,
    kv_dtype: jax.typing.DTypeLike | None = None,
    residual: Residual | None = None,
    component: Component | None = None,
    adjust: Adjust | None = None,
) -> None:
    """Compile the programs that `generate` with these arguments will run, so that none is compiled while it runs.

    The model's parameters may be `jax.ShapeDtypeStruct`s still (`open_model`).
    """
    requests = make_requests(model, prompts, sampling)
    seams = {"residual": residual, "component": component, "adjust": adjust}
    with engine_for(model, requests, max_batch_size, kv_dtype, **seams) as engine, engine.rehearsal():
        for request in requests[:max_batch_size]:
            engine.add(request)
        decoded = set()
        for chunk in engine.run():
            if chunk.output is not None and chunk.output.error is not None:
                raise chunk.output.error
            if chunk.finish_reason or len(requests[chunk.index].tokens) > 1:
                decoded.add(chunk.index)
            if len(decoded) == len(requests[:max_batch_size]):
                break


def engine_for(
    model: Model,
    requests: Sequence[Request],
    max_batch_size: int,
    kv_dtype: jax.typing.DTypeLike | None,
    **seams: Any,
) -> Engine:
    """An engine for these requests, of sizes that few calls differ in: they are those of compiled programs."""
    if max_batch_size <= 0:
        raise ValueError(f"max_batch_size is {max_batch_size}; it must be positive")
    slots = buckets.batch_bucket(max(1, min(len(requests), max_batch_size)))
    longest = buckets.cache_bucket(max((len(r.prompt) + r.max_tokens for r in requests), default=1))
    prefill_tokens = slots * buckets.PREFILL_CHUNK
    # Who names a number of tokens gets room for them; others take what there is.
    least = max((len(r.prompt) + (1 if r.params.max_tokens is None else r.max_tokens) for r in requests), default=1)
    tokens = default_cache_tokens(model, slots, longest, prefill_tokens, kv_dtype)
    return Engine(
        model,
        max_batch_size=slots,
        cache_tokens=max(tokens, buckets.cache_bucket(least)),
        max_length=longest,
        prefill_tokens=prefill_tokens,
        kv_dtype=kv_dtype,
        whole_batches=True,
        **seams,
    )
