"""Text in, text out: every prompt through an engine of just the size."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from tqdm import tqdm

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
from .speculation.drafter import Drafter


@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    callback=arguments.optional(arguments.function(1)),
    max_batch_size=arguments.whole,
    **arguments.seams,
    adjust=arguments.optional(arguments.function(2)),
    drafter=arguments.optional(arguments.instance(Drafter)),
    progress=arguments.flag,
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
    drafter: Drafter | None = None,
    progress: bool = False,
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
      drafter: guesses tokens, several of which are then checked at once; it changes none.
      progress: whether to show a bar on standard error, of requests and tokens.

    Returns:
      One output a prompt, in order, whose `samples` are as many as `SamplingParams.n`. A request's tokens do not depend
      on what it is batched with.

    Raises:
      TypeError, ValueError: an argument of another type or out of range, a prompt that is empty or becomes no tokens,
        token ids outside the vocabulary, a prompt as long as the model's longest sequence, stop strings without a
        tokenizer, an unknown `kv_dtype`, a drafter that cannot draft for the model; all before any device work.
      FloatingPointError: a prompt after which the logits are not finite, naming it.
    """
    outputs: dict[int, RequestOutput] = {}
    seams = {"residual": residual, "component": component, "adjust": adjust, "drafter": drafter}
    sizes = {"max_batch_size": max_batch_size, "kv_dtype": kv_dtype}
    for chunk in stream(model, prompts, sampling, **sizes, **seams, progress=progress):
        if callback is not None:
            callback(chunk)
        if chunk.output is not None:
            chunk.output.raise_for_error()
            outputs[chunk.index] = chunk.output
    return [outputs[index] for index in range(len(outputs))]


@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    max_batch_size=arguments.whole,
    **arguments.seams,
    adjust=arguments.optional(arguments.function(2)),
    drafter=arguments.optional(arguments.instance(Drafter)),
    progress=arguments.flag,
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
    drafter: Drafter | None = None,
    progress: bool = False,
) -> Iterator[StreamChunk]:
    """Like `generate`, but yields the output as it comes, in blocks of a few tokens a request.

    The arguments are checked when it is called, before the first chunk is asked for. A request that fails ends with
    "error" for its `finish_reason`, and what failed in its output; the others go on.
    """
    requests = make_requests(model, prompts, sampling)
    seams = {"residual": residual, "component": component, "adjust": adjust, "drafter": drafter}
    engine = engine_for(model, requests, max_batch_size, kv_dtype, **seams)
    for request in requests:
        engine.add(request)
    return _run(engine, progress)


def _run(engine: Engine, progress: bool) -> Iterator[StreamChunk]:
    """All that an engine's requests make; then it is closed."""
    count, tokens = engine.stats().waiting, 0
    with engine, tqdm(total=count, unit="request", miniters=0, disable=not progress, file=sys.stderr) as bar:
        for chunk in engine.run():
            tokens += len(chunk.tokens)
            bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            bar.update(chunk.output is not None)
            yield chunk


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
    drafter: Drafter | None = None,
    meanwhile: Callable[[], Any] = lambda: None,
) -> Any:
    """Compile the programs that `generate` with these arguments will run, so that none is compiled while it runs.

    The model's parameters may be `jax.ShapeDtypeStruct`s still (`open_model`).

    Returns:
      What `meanwhile` does, which is called while XLA compiles, such as what reads the weights.
    """
    requests = make_requests(model, prompts, sampling)
    seams = {"residual": residual, "component": component, "adjust": adjust, "drafter": drafter}
    with engine_for(model, requests, max_batch_size, kv_dtype, **seams) as engine, engine.rehearsal():
        for request in requests[:max_batch_size]:
            engine.add(request)
        rows = min(sum(len(request.samples) for request in requests), max_batch_size)
        decoded: set[tuple[int, int]] = set()
        for chunk in engine.run():
            if chunk.output is not None:
                chunk.output.raise_for_error()
            if chunk.finish_reason or len(requests[chunk.index].samples[chunk.sample].tokens) > 1:
                decoded.add((chunk.index, chunk.sample))
            if len(decoded) == rows:
                break
        return meanwhile()


def engine_for(
    model: Model,
    requests: Sequence[Request],
    max_batch_size: int,
    kv_dtype: jax.typing.DTypeLike | None,
    drafter: Drafter | None = None,
    **seams: Any,
) -> Engine:
    """An engine for these requests, of sizes that few calls differ in: they are those of compiled programs."""
    if max_batch_size <= 0:
        raise ValueError(f"max_batch_size is {max_batch_size}; it must be positive")
    rows = sum(len(request.samples) for request in requests)
    slots = buckets.batch_bucket(max(1, min(rows, max_batch_size)))
    longest = buckets.cache_bucket(max((len(r.prompt) + r.max_tokens for r in requests), default=1))
    prefill_tokens = slots * buckets.PREFILL_CHUNK
    # Who names a number of tokens gets room for them; others take what there is.
    least = max((len(r.prompt) + (1 if r.params.max_tokens is None else r.max_tokens) for r in requests), default=1)
    tokens = default_cache_tokens(model, slots, longest, prefill_tokens, kv_dtype, drafter)
    return Engine(
        model,
        max_batch_size=slots,
        cache_tokens=max(tokens, buckets.cache_bucket(least)),
        max_length=longest,
        prefill_tokens=prefill_tokens,
        kv_dtype=kv_dtype,
        whole_batches=True,
        drafter=drafter,
        **seams,
    )
