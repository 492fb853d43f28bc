"""How many tokens an engine's rounds draft, and what became of them."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np

from ..speculation.drafter import Drafter
from ..speculation.length import DraftLength
from .results import Dispatch, PromptLogprobs, RowTokens, ScoredPrompts
from .scheduler import Row


@dataclasses.dataclass(frozen=True)
class SpeculationStats:
    """What speculation has come to.

    Attributes:
      rounds: of rows that take drafts, each row's counted.
      tokens: that these have made.
      drafted, accepted: at each place of a draft, how many tokens were guessed after a right beginning, and how many
        of those were right.
      draft_tokens: how many a round drafts now.
    """

    rounds: int
    tokens: int
    drafted: tuple[int, ...]
    accepted: tuple[int, ...]
    draft_tokens: int


class Drafts:
    """Picks how many tokens each dispatch drafts, and counts them.

    Args:
      drafter: the most that it drafts counts.
      adapts: whether fewer may be drafted.
    """

    def __init__(self, drafter: Drafter, adapts: bool):
        adapts = adapts and jax.process_count() == 1
        self._length = DraftLength(drafter.tokens) if adapts else None
        self.sizes: Sequence[int] = self._length.sizes if adapts else (drafter.tokens,)
        self.size = drafter.tokens
        self._last_read = 0.0
        self._rounds = self._tokens = 0
        self._drafted, self._accepted = np.zeros((2, drafter.tokens), int)

    def pick(self, rows: int) -> int:
        """How many tokens to draft in programs of so many rows, 0 for no program."""
        if rows and self._length is not None:
            self.size = self._length.pick(rows)
        return self.size

    def read(
        self, dispatch: Dispatch | ScoredPrompts, results: Sequence[tuple[Row, RowTokens | PromptLogprobs]]
    ) -> None:
        """Learn from what was read of a dispatch just now."""
        before, self._last_read = self._last_read, time.perf_counter()
        if not isinstance(dispatch, Dispatch) or dispatch.drafting is None:
            return
        how, speculating = dispatch.drafting, [made for row, made in results if row.speculates]
        made, drafted = ([n for one in speculating for n in getattr(one, name)] for name in ("rounds", "drafted"))
        made, drafted = np.array(made, int), np.array(drafted, int)
        made, drafted = made[made > 0], drafted[made > 0]
        if self._length is not None:
            seconds = (self._last_read - max(how.started, before)) / how.rounds if how.alone else None
            self._length.measured(how.rows, how.size, seconds, made - 1)
        places = np.arange(len(self._drafted))
        self._rounds, self._tokens = self._rounds + len(made), self._tokens + int(made.sum())
        self._drafted += (np.minimum(drafted[:, None], made[:, None]) > places).sum(axis=0)
        self._accepted += (made[:, None] - 1 > places).sum(axis=0)

    def stats(self) -> SpeculationStats:
        counts = tuple(map(int, self._drafted)), tuple(map(int, self._accepted))
        return SpeculationStats(self._rounds, self._tokens, *counts, self.size)
