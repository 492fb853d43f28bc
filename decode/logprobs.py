"""Log-probabilities of given tokens, from the final hidden states of what comes before them.

The logits of a few tokens at a time are held, never those of a whole text.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import unembed
from ..sharding.rules import constrain
from .sampling.draw import SampleLogprobs, token_logprobs

LOGITS = 256
"""Tokens whose logits are held at once, where rows are no more."""


def target_logprobs(
    params: Sequence[Params],
    configs: Sequence[ModelConfig],
    hidden: Sequence[Float[Array, "B T _"]],
    targets: Int[Array, "B T"],
    scored: Bool[Array, "B T"],
    top: int,
) -> tuple[SampleLogprobs, dict[str, Float[Array, "B T"]]]:
    """Log-probabilities of the tokens that follow each position, in float32.

    Args:
      params, configs: of a model, or of two: the second is a reference that the first is compared with.
      hidden: what `extend` returns of each without logits.
      targets: the token that follows each position.
      scored: positions that count; the others get zeros, and where there are none nothing is computed.
      top: how many of the likeliest tokens to list.

    Returns:
      Those of the first model; and of two models the "reference"'s log-probabilities of the targets, "agreement", 1
      where both find the same token likeliest, and "divergence", KL(reference || model) in nats.
    """

    def of_slice(hidden, targets, scored):
        def figures():
            logits = [
                constrain(unembed(*model, x), "batch", None, "vocab")
                for *model, x in zip(params, configs, hidden, strict=True)
            ]
            return token_logprobs(logits[0], targets, top), _compared(*logits, targets) if len(logits) == 2 else {}

        def none():
            return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(figures))

        made = lax.cond(jnp.any(scored), figures, none)
        return jax.tree.map(lambda x: jnp.where(scored.reshape(*scored.shape, *[1] * (x.ndim - 2)), x, 0), made)

    return _in_slices(of_slice, (tuple(hidden), targets, scored))


def _compared(logits, reference, targets):
    ours, theirs = jax.nn.log_softmax(logits), jax.nn.log_softmax(reference)
    return {
        "reference": jnp.take_along_axis(theirs, targets[..., None], axis=-1)[..., 0],
        "agreement": (logits.argmax(-1) == reference.argmax(-1)).astype(jnp.float32),
        "divergence": (jnp.exp(theirs) * (theirs - ours)).sum(-1),
    }


def _in_slices(function: Callable[..., Any], arrays: Any) -> Any:
    """A function of arrays [B, T, ...], a few of the T at a time; T is a power of two."""
    B, T = arrays[1].shape
    width = min(T, 1 << max(0, (LOGITS // B).bit_length() - 1))
    if width == T:
        return function(*arrays)
    parts = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(B, T // width, width, *x.shape[2:]), 1, 0), arrays)
    made = lax.map(lambda part: function(*part), parts)
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), made)


def check_finite(
    name: str, dtype: str, tokens: Sequence[int] | Int[np.ndarray, "_"], start: int, logprobs: Float[np.ndarray, "N"]
) -> None:
    """Refuse what JSON cannot hold, and sums cannot use.

    Args:
      name: of the text.
      dtype: of the model.
      tokens: the whole of it.
      start: place of the first token that `logprobs` are of.
      logprobs: on the host.

    Raises:
      FloatingPointError: one is not finite, naming the text, the token and the dtype.
    """
    if not np.isfinite(logprobs).all():
        at = int(np.argmin(np.isfinite(logprobs)))
        what = f"{name}: the log-probability of token {start + at} (id {tokens[start + at]}) is {logprobs[at]}"
        raise not_finite(what, dtype)


def not_finite(what: str, dtype: str) -> FloatingPointError:
    """The error for what logits that are no numbers have led to, in a model of that dtype."""
    remedy = "look at its weights, and at what intervenes" if dtype == "float32" else "load it in float32"
    return FloatingPointError(f"{what}, as the model, in {dtype}, has logits there that are not finite; {remedy}")
