"""What was asked of the device and is on its way: to whom it belongs, and how the host takes it apart."""

import dataclasses
import operator
from collections.abc import Sequence
from typing import ClassVar

import jax
import numpy as np

from ..sampling.draw import NO_TOKEN, SampleLogprobs
from ..speculation.loop import NOTHING
from .scheduler import Chunk, Row
from .slots import Sampled


@dataclasses.dataclass(frozen=True)
class RowTokens:
    """The tokens that one dispatch has made of a row.

    Attributes:
      tokens: in order.
      logprobs: of each, if the dispatch has any.
      rounds, drafted: of each round of speculation, how many of the tokens it made, and how many it had drafted.
    """

    tokens: list[int]
    logprobs: SampleLogprobs | None
    rounds: np.ndarray
    drafted: np.ndarray

    @property
    def is_broken(self) -> bool:
        """Whether logits were no numbers at some token, which is `NO_TOKEN`."""
        return NO_TOKEN in self.tokens

    def speculation(self, count: int) -> tuple[int, int]:
        """How many tokens were drafted and how many accepted, of the rounds that made the first `count` tokens."""
        begun = np.cumsum(self.rounds) - self.rounds < count
        return int(self.drafted[begun].sum()), int(np.maximum(self.rounds - 1, 0)[begun].sum())


@dataclasses.dataclass(frozen=True)
class PromptLogprobs:
    """Log-probabilities of what follows the tokens of a prompt from number `start` on."""

    start: int
    logprobs: SampleLogprobs
    is_broken: ClassVar[bool] = False  # the token that is drawn next tells


@dataclasses.dataclass(frozen=True)
class Drafting:
    """How rounds of speculation were dispatched.

    Attributes:
      rows: that its programs are for.
      size: tokens that each round drafts.
      rounds: how many.
      alone: whether nothing else was dispatched in the step.
      started: by `time.perf_counter`.
    """

    rows: int
    size: int
    rounds: int
    alone: bool
    started: float


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Tokens that were asked of the device: those of each row stand in one column."""

    sampled: Sampled
    rows: Sequence[Row]
    columns: Sequence[int]
    drafting: Drafting | None = None

    def read(self) -> list[tuple[Row, RowTokens]]:
        """Wait for the tokens; those of each row."""
        sampled = jax.device_get(self.sampled)
        if sampled[0].ndim == 2:  # one token a step
            sampled = jax.tree.map(lambda x: x[:, :, None], sampled)
        of_columns = (jax.tree.map(lambda x, n=n: x[:, n], sampled) for n in self.columns)
        return [(row, _of_row(*made)) for row, made in zip(self.rows, of_columns, strict=True)]


@dataclasses.dataclass(frozen=True)
class ScoredPrompts:
    """Log-probabilities that were asked of the device: those of each chunk's tokens stand in one row."""

    logprobs: SampleLogprobs
    chunks: Sequence[Chunk]
    places: Sequence[int]

    @property
    def rows(self) -> list[Row]:
        return [chunk.row for chunk in self.chunks]

    def read(self) -> list[tuple[Row, PromptLogprobs]]:
        """Wait for the log-probabilities; those of each row."""
        logprobs = jax.device_get(self.logprobs)
        parts = [np.s_[place, : chunk.count] for place, chunk in zip(self.places, self.chunks, strict=True)]
        of_chunks = (jax.tree.map(operator.itemgetter(part), logprobs) for part in parts)
        return [
            (chunk.row, PromptLogprobs(chunk.start, made)) for chunk, made in zip(self.chunks, of_chunks, strict=True)
        ]


def _of_row(tokens: np.ndarray, logprobs: SampleLogprobs | None) -> RowTokens:
    kept = tokens >= NO_TOKEN
    drafted = tokens[:, 1:] > NOTHING
    return RowTokens(
        tokens[kept].tolist(), jax.tree.map(lambda x: x[kept], logprobs), kept.sum(axis=1), drafted.sum(axis=1)
    )
