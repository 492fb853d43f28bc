"""What cached keys depend on besides their tokens: the frequencies of length-dependent RoPE."""

import sys
from collections.abc import Callable

from ...model.config import ModelConfig
from .scheduler import Regime


def regime_of(config: ModelConfig) -> Callable[[int], Regime]:
    """The regime of a row that is read with some length.

    LongRoPE has two sets of frequencies, by whether the length is past the pre-training context. "dynamic" has others
    at each length past it, so that only what was read up to there may be shared.
    """
    ropes = {layer.rope for layer in config.layers}
    borders = sorted({rope.original_max_position for rope in ropes if rope.kind == "longrope"})
    ends = [rope.original_max_position for rope in ropes if rope.kind == "dynamic"]

    def regime(length: int) -> Regime:
        past = bytes(length > border for border in borders)
        end = min(ends, default=sys.maxsize)
        return past, end if length <= end else 0

    return regime
