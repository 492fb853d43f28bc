"""Beam search, out of the public parts: `prefill`, `decode_step` and `fork`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..model import arguments
from ..model.loading import Model
from . import buckets
from .cache import init_cache
from .fork import fork
from .logprobs import not_finite
from .prefill import prefill
from .prompts import Prompts, make_requests
from .request import Request
from .sampling.params import SamplingParams
from .step import decode_step

_LARGEST_PENALTY = 10.0


@dataclasses.dataclass(frozen=True)
class BeamSearchSequence:
    """One beam, with vLLM's names.

    Attributes:
      tokens: the prompt's token ids and the new ones.
      cum_logprob: sum of the new tokens' log-probabilities.
      text: of the new tokens; None where the model has no tokenizer.
      finish_reason: "stop" where it ends with an end-of-sequence token, else "length".
      score: `cum_logprob` over the number of new tokens to the power of `length_penalty`.
    """

    tokens: list[int]
    cum_logprob: float
    text: str | None
    finish_reason: str
    score: float


@dataclasses.dataclass(frozen=True)
class BeamSearchOutput:
    """The beams of one prompt, best first."""

    sequences: list[BeamSearchSequence]


@jax.transfer_guard("allow")
@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    beam_width=arguments.whole,
    max_tokens=arguments.whole,
    length_penalty=arguments.number,
    ignore_eos=arguments.flag,
)
def beam_search(
    model: Model,
    prompts: Prompts,
    beam_width: int = 4,
    max_tokens: int = 16,
    *,
    length_penalty: float = 1.0,
    ignore_eos: bool = False,
    kv_dtype: jax.typing.DTypeLike | None = None,
) -> list[BeamSearchOutput]:
    """The likeliest continuations of each prompt that `beam_width` beams find (transformers' `num_beams`).

    In each step every beam offers its likeliest tokens, and the `beam_width` best of all go on. Those that end are kept
    aside; a prompt is done once it has as many of them as beams and none that goes on scores more.

    Args:
      model: on one device or a mesh that splits no rows.
      prompts: as `generate` takes them.
      beam_width: beams a prompt, 1 or more.
      max_tokens: most new tokens.
      length_penalty: above 0 favors longer beams.
      ignore_eos: whether end-of-sequence tokens end nothing.
      kv_dtype: as `init_cache` takes it.

    Raises:
      ValueError: what `generate` refuses, or a size below 1.
      FloatingPointError: logits that are not finite, naming the prompt.
    """
    if beam_width < 1:
        raise ValueError(f"beam_search: beam_width is {beam_width}; it must be at least 1")
    if abs(length_penalty) > _LARGEST_PENALTY:
        raise ValueError(f"beam_search: length_penalty is {length_penalty}; it must be within {_LARGEST_PENALTY} of 0")
    requests = make_requests(model, prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens))
    ends = frozenset() if ignore_eos else frozenset(model.generation.eos_token_ids)
    sizes = beam_width, float(length_penalty), ends, kv_dtype
    return [_search(model, index, request, *sizes) for index, request in enumerate(requests)]


def _search(
    model: Model, index: int, request: Request, width: int, penalty: float, ends: frozenset[int], kv_dtype: Any
) -> BeamSearchOutput:
    prompt, room, dtype = request.prompt, request.max_tokens, model.config.dtype
    capacity = buckets.cache_bucket(len(prompt) + room)
    cache = init_cache(model.config, width, capacity, mesh=model.mesh, kv_dtype=kv_dtype)
    for start in range(0, len(prompt), buckets.PREFILL_CHUNK):  # into the first row; the others have nothing yet
        part = prompt[start : start + buckets.PREFILL_CHUNK]
        tokens = np.zeros((width, buckets.prefill_bucket(len(part))), np.int32)
        tokens[0, : len(part)] = part
        logits, cache = prefill(
            model.params, model.config, tokens, np.eye(1, width, dtype=np.int32)[0] * len(part), cache
        )
    cache, logits = fork(cache, [0] * width), jnp.broadcast_to(logits[0], logits.shape)

    beams: list[list[int]] = [[]] * width
    scores = np.where(np.arange(width), -np.inf, 0.0).astype(np.float32)  # they begin as one
    finished: list[BeamSearchSequence] = []

    def finish(tokens: list[int], total: float, reason: str) -> None:
        text = None if model.tokenizer is None else model.tokenizer.decode(tokens, skip_special_tokens=True)
        score = total / len(tokens) ** penalty
        finished.append(BeamSearchSequence([*prompt, *tokens], total, text, reason, score))
        finished.sort(key=lambda sequence: -sequence.score)
        del finished[width:]

    for step in range(1, room + 1):
        best, offers = map(np.asarray, _best(logits, scores))
        if not np.isfinite(best[0]):
            raise not_finite(f"prompt {index}: no token can be told after {len(prompt)} and {step - 1} new", dtype)
        offers = [
            (total, *divmod(offer, logits.shape[1]))
            for total, offer in zip(best.tolist(), offers.tolist(), strict=True)
        ]
        for total, parent, token in offers[:width]:
            if token in ends:
                finish([*beams[parent], token], total, "stop")
        offers = [offer for offer in offers if offer[2] not in ends][:width]
        beams, scores = (
            [[*beams[parent], token] for _, parent, token in offers],
            np.float32([total for total, _, _ in offers]),
        )
        if len(finished) == width and finished[-1].score >= scores[0] / step**penalty:
            break
        if step == room:
            for tokens, total in zip(beams, scores.tolist(), strict=True):
                finish(tokens, total, "length")
            break
        cache = fork(cache, [parent for _, parent, _ in offers])
        logits, cache = decode_step(model.params, model.config, np.int32([token for _, _, token in offers]), cache)
    return BeamSearchOutput(finished)


@jax.jit
def _best(logits: Float[Array, "W V"], scores: Float[Array, "W"]) -> tuple[Float[Array, "N"], Int[Array, "N"]]:
    """The best continuations, twice as many as beams lest all of them end: scores, and beam * V + token."""
    totals = scores[:, None] + jax.nn.log_softmax(logits, axis=1)
    best, offers = jax.lax.top_k(totals.ravel(), 2 * len(logits))
    return best, offers
