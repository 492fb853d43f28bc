"""Prompt lookup: what followed the last tokens where they stood before.

Source: Saxena 2023, "Prompt Lookup Decoding", github.com/apoorvumang/prompt-lookup-decoding.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from ..sampling.layout import SamplingPlan
from ..sampling.scores import Adjust
from .drafter import Drafter, Texts, check_tokens


@dataclasses.dataclass(frozen=True)
class NGramDrafter(Drafter):
    """Guesses that a text repeats itself, prompt and output alike; it costs next to nothing.

    It looks for the longest run of last tokens that stood in the text before, the latest of equals, and guesses what
    followed it. Where not even the last token did, it guesses nothing.

    Args:
      tokens: how many to guess at once, 1 to 15.
      longest: most tokens of a run that are compared.

    Raises:
      ValueError: a number out of range.
    """

    tokens: int = 4
    longest: int = 4

    def __post_init__(self):
        check_tokens(self.tokens)
        if self.longest < 1:
            raise ValueError(f"longest is {self.longest}; compare at least 1 token")

    def propose(
        self, params: Any, pages: Any, texts: Texts, plan: SamplingPlan, adjust: Adjust | None
    ) -> tuple[Int[Array, "B K"], Int[Array, "B"], Any]:
        history, last = texts.history, texts.rows.lengths[:, None]
        places = jnp.arange(history.shape[1])
        run, matched = places < last, jnp.zeros_like(history)
        for back in range(self.longest):
            token = jnp.take_along_axis(history, last - back, axis=1, mode="clip")
            run &= (jnp.roll(history, back, axis=1) == token) & (places >= back)
            matched += run
        longest = matched.max(axis=1, keepdims=True)
        end = jnp.max(jnp.where(matched == longest, places, 0), axis=1, keepdims=True)
        # A run that ends less than `tokens` before the last one repeats with that period.
        following = end + 1 + jnp.arange(self.tokens) % jnp.maximum(last - end, 1)
        guesses = jnp.take_along_axis(history, following, axis=1, mode="clip")
        return guesses, jnp.where(longest[:, 0] > 0, self.tokens, 0), pages
