"""How many tokens to draft: the number with which tokens come fastest, by what was measured so far.

A round that drafts k tokens makes 1 + s_1 + ... + s_k, where s_i is the share of rounds whose first i drafts are right:
Leviathan, Kalman and Matias 2023 ("Fast Inference from Transformers via Speculative Decoding", section 3.1), without
their assumption that each is right with the same probability.
"""

import collections

import numpy as np
from jaxtyping import Int

PATIENCE = 16
"""Dispatches after which another number is tried, which may have become the better one."""
_RECENT = 4  # timings, of which the least counts: whoever reads the tokens may keep a step waiting
_FADING = 0.95  # a dispatch, of what counts for the shares


def draft_sizes(most: int) -> tuple[int, ...]:
    """Numbers of tokens that programs are compiled for: none, and `most`, a half of it, a quarter and so on."""
    return (0, *sorted(most >> n for n in range(most.bit_length())))


class DraftLength:
    """Picks a number of tokens to draft for each dispatch.

    It begins with the most, tries a neighbor or none now and then, and keeps to the fastest. The first dispatch with a
    number, which may have compiled a program, is not timed.

    Args:
      most: tokens.
      least: 1 where a drafter is not to stop.
    """

    def __init__(self, most: int, least: int = 0):
        self.sizes = [size for size in draft_sizes(most) if size >= least]
        self._rounds, self._right = np.zeros(most), np.zeros(most)  # of which i + 1 tokens were drafted, and right
        self._seconds: dict[tuple[int, int], collections.deque[float]] = {}  # a round, by rows and size
        self._dispatches: collections.Counter[int] = collections.Counter()  # by rows
        self._tried: dict[tuple[int, int], int] = {}  # in which of these dispatches, by rows and size

    def pick(self, rows: int) -> int:
        """For a dispatch of programs with so many rows."""
        self._dispatches[rows] += 1
        now = self._dispatches[rows]
        timed = [size for size in self.sizes if self._seconds.get((rows, size))]
        begun = [size for size in self.sizes if (rows, size) in self._seconds and size not in timed]
        size = begun[0] if begun else max(timed, key=lambda size: self._rate(rows, size), default=self.sizes[-1])
        if timed and not begun and now % PATIENCE == 0:
            place = self.sizes.index(size)
            others = {self.sizes[0], *self.sizes[max(0, place - 1) : place + 2]} - {size}
            size = min(others, key=lambda other: (self._tried.get((rows, other), 0), -other), default=size)
        self._tried[rows, size] = now
        return size

    def measured(self, rows: int, size: int, seconds: float | None, accepted: Int[np.ndarray, "N"]) -> None:
        """What a dispatch came to.

        Args:
          rows, size: of its programs.
          seconds: a round of it; None where something else ran too.
          accepted: of each round of each row that takes drafts, how many were right.
        """
        if (rows, size) not in self._seconds:
            self._seconds[rows, size] = collections.deque(maxlen=_RECENT)
        elif seconds is not None:
            self._seconds[rows, size].append(max(seconds, 1e-9))
        if size and len(accepted):
            self._rounds[:size] = _FADING * self._rounds[:size] + len(accepted)
            right = np.greater.outer(accepted, np.arange(size)).sum(axis=0)
            self._right[:size] = _FADING * self._right[:size] + right

    def _rate(self, rows: int, size: int) -> float:
        """Tokens a row and second."""
        shares = self._right[:size] / np.maximum(self._rounds[:size], 1e-9)
        return (1 + shares.sum()) / min(self._seconds[rows, size])
