"""What a draft model gains: tokens a round, and the time of a round.

Source: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", section 3.
"""

import dataclasses
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

from ..model import arguments
from .counts import count_step
from .deployment import Deployment
from .hardware import Hardware
from .predict import Phase, predict, predict_decode

Acceptance = int | float | Sequence[int | float]
"""The chance that a drafted token is accepted: of each alike, or of one at each place, those before it accepted."""


def _acceptance(name: str, value: Any) -> None:
    for chance in value if isinstance(value, list | tuple) else [value]:
        arguments.number(name, chance)


@arguments.arguments(acceptance=_acceptance, draft_tokens=arguments.whole)
def expected_tokens(acceptance: Acceptance, draft_tokens: int) -> float:
    """Tokens that a round yields on average, the target's own included: (1 - a^(k+1)) / (1 - a) for one chance a.

    Args:
      acceptance: of one token, or of `draft_tokens`.
      draft_tokens: k, how many the draft proposes.

    Raises:
      ValueError: an argument out of range.
    """
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens is {draft_tokens}; it must be at least 1")
    chances = [acceptance] * draft_tokens if isinstance(acceptance, int | float) else list(acceptance)
    if len(chances) != draft_tokens or not all(0 <= chance <= 1 for chance in chances):
        raise ValueError(f"acceptance is {acceptance}; it must be from 0 to 1, once or for each of {draft_tokens}")
    # The sum, not the quotient: it is the same number and is defined at 1.
    return 1 + sum(itertools.accumulate(chances, operator.mul))


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A decode round: the draft proposes, the target verifies all proposals in one step.

    Attributes:
      draft_tokens: how many are proposed.
      tokens: that it yields a row, on average.
      draft_seconds: of the proposals, one after the other.
      verify: the step in which the target scores all of them and one token more.
      plain_seconds: a decode step without a draft.
    """

    draft_tokens: int
    tokens: float
    draft_seconds: float
    verify: Phase
    plain_seconds: float

    @property
    def tpot(self) -> float:
        """Mean seconds a token."""
        return (self.draft_seconds + self.verify.seconds) / self.tokens

    @property
    def speedup(self) -> float:
        """Over decoding without a draft; below 1 it does not pay."""
        return self.plain_seconds / self.tpot


@arguments.arguments(
    target=arguments.instance(Deployment),
    draft=arguments.optional(arguments.instance(Deployment)),
    hardware=arguments.instance(Hardware, hint="such as find_hardware('h100')"),
    batch=arguments.whole,
    context=arguments.whole,
    acceptance=_acceptance,
    draft_tokens=arguments.whole,
    efficiency=arguments.number,
)
def predict_speculation(
    target: Deployment,
    draft: Deployment | None,
    hardware: Hardware,
    *,
    batch: int,
    context: int,
    acceptance: Acceptance,
    draft_tokens: int,
    efficiency: int | float = 1.0,
) -> Speculation:
    """The time of a round, and what it yields.

    Args:
      target, draft, hardware: the models on the same devices; the draft may be on fewer of them, and None for one that
        costs nothing, such as prompt lookup.
      batch: rows.
      context: positions that the first new token sees, itself included.
      acceptance, draft_tokens: as in `expected_tokens`.
      efficiency: as in `predict`.

    Raises:
      ValueError: an argument out of range, or what `predict` refuses.
    """
    tokens = expected_tokens(acceptance, draft_tokens)
    proposals = (
        []
        if draft is None
        else (
            predict_decode(draft, hardware, batch=batch, context=context + step, efficiency=efficiency).seconds
            for step in range(draft_tokens)
        )
    )
    verify = count_step(target, batch, tokens=draft_tokens + 1, cached=context - 1, scored=draft_tokens + 1)
    dtype, tensor = target.config.dtype, target.tensor
    return Speculation(
        draft_tokens=draft_tokens,
        tokens=tokens,
        draft_seconds=math.fsum(proposals),
        verify=predict(verify, hardware, dtype, tensor=tensor, efficiency=efficiency),
        plain_seconds=predict_decode(target, hardware, batch=batch, context=context, efficiency=efficiency).seconds,
    )


def best_speculation(
    target: Deployment, draft: Deployment | None, hardware: Hardware, *, most: int = 8, **round_of: Any
) -> Speculation:
    """The fastest of rounds that draft 1 to `most` tokens; the other arguments as in `predict_speculation`.

    Where even that has a `speedup` below 1, plain decoding is faster.
    """
    sizes = range(1, most + 1)
    rounds = [predict_speculation(target, draft, hardware, draft_tokens=size, **round_of) for size in sizes]
    return max(rounds, key=lambda speculation: speculation.speedup)
