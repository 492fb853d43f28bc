"""What a draft model gains: tokens a round, and the time of a round.

Source: Leviathan, Kalman and Matias 2023, "Fast Inference from Transformers via Speculative Decoding", section 3.
"""

import dataclasses

from ..model import arguments
from .counts import count_step
from .deployment import Deployment
from .hardware import Hardware
from .predict import Phase, predict, predict_decode


@arguments.arguments(acceptance=arguments.number, draft_tokens=arguments.whole)
def expected_tokens(acceptance: int | float, draft_tokens: int) -> float:
    """Tokens that a round yields on average, the target's own included: (1 - a^(k+1)) / (1 - a).

    Args:
      acceptance: a, the chance that the target accepts a token of the draft, each for itself.
      draft_tokens: k, how many the draft proposes.

    Raises:
      ValueError: an argument out of range.
    """
    if not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}; it must be from 0 to 1")
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens is {draft_tokens}; it must be at least 1")
    # The sum, not the quotient: it is the same number and is defined at 1.
    return sum(float(acceptance) ** accepted for accepted in range(draft_tokens + 1))


@dataclasses.dataclass(frozen=True)
class Speculation:
    """A decode round: the draft proposes, the target verifies all proposals in one step.

    Attributes:
      tokens: that it yields a row, on average.
      draft_seconds: of the proposals, one after the other.
      verify: the step in which the target scores all of them and one token more.
      plain_seconds: a decode step without a draft.
    """

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
    draft=arguments.instance(Deployment),
    hardware=arguments.instance(Hardware, hint="such as find_hardware('h100')"),
    batch=arguments.whole,
    context=arguments.whole,
    acceptance=arguments.number,
    draft_tokens=arguments.whole,
    efficiency=arguments.number,
)
def predict_speculation(
    target: Deployment,
    draft: Deployment,
    hardware: Hardware,
    *,
    batch: int,
    context: int,
    acceptance: int | float,
    draft_tokens: int,
    efficiency: int | float = 1.0,
) -> Speculation:
    """The time of a round, and what it yields.

    Args:
      target, draft, hardware: the models on the same devices; the draft may be on fewer of them.
      batch: rows.
      context: positions that the first new token sees, itself included.
      acceptance, draft_tokens: as in `expected_tokens`.
      efficiency: as in `predict`.

    Raises:
      ValueError: an argument out of range, or what `predict` refuses.
    """
    tokens = expected_tokens(acceptance, draft_tokens)
    proposals = (
        predict_decode(draft, hardware, batch=batch, context=context + step, efficiency=efficiency).seconds
        for step in range(draft_tokens)
    )
    verify = count_step(target, batch, tokens=draft_tokens + 1, cached=context - 1, scored=draft_tokens + 1)
    dtype, tensor = target.config.dtype, target.tensor
    return Speculation(
        tokens=tokens,
        draft_seconds=sum(proposals),
        verify=predict(verify, hardware, dtype, tensor=tensor, efficiency=efficiency),
        plain_seconds=predict_decode(target, hardware, batch=batch, context=context, efficiency=efficiency).seconds,
    )
