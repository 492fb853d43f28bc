"""The seam between speculation and whatever guesses the tokens to come."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ...model.config import ModelConfig
from ...model.loading import Model
from ..cache import Rows
from ..sampling.layout import SamplingPlan
from ..sampling.scores import Adjust
from ..sampling.state import SamplingState

MOST_TOKENS = 15
"""That may be drafted at once: attention verifies them and the token before them in one pass, of 16 at most."""


@struct.dataclass
class Texts:
    """What a drafter sees of the rows.

    Attributes:
      rows: of the target's cache. Row b's last token stands at position `lengths[b]`, and is not cached.
      history: [B, C] int32, the tokens of prompt and output by position, of which those past the last are nobody's.
      features: [B, F], what `Drafter.layers` asks for of the token before each row's last; None if it asks for none.
      sampling: what each row asks for, and what it has sampled.
    """

    rows: Rows
    history: Any
    features: Any
    sampling: SamplingState


class Drafter(abc.ABC):
    """Guesses the next tokens of every row. Hashable: a static argument of the programs that use it.

    What it guesses changes no token of the output, only how many come at once.

    Attributes:
      tokens: how many it guesses, 1 to 15.
      configs: models whose keys and values it keeps, in pages of its own.
      layers: after how many of the target's layers it is to see the residual stream, ascending. Features are the
        streams there side by side, F wide.
    """

    tokens: int
    configs: Sequence[ModelConfig] = ()
    layers: Sequence[int] = ()

    def bind(self, target: Model) -> tuple[Any, "Drafter"]:
        """Its parameters, and what drafts for a target with them.

        Raises:
          ValueError: it cannot draft for this target.
        """
        return None, self

    def init_pages(
        self, pages: Sequence[int], page_size: int, mesh: Mesh | None, kv_dtype: jax.typing.DTypeLike | None
    ) -> Any:
        """Pages for the block tables of the target, of which each kind of layer has so many; None if it needs none."""
        return None

    def shortened(self, tokens: int) -> "Drafter":
        """The same that guesses fewer tokens at once; with 0 it sees what is made, where it asks for `layers`."""
        return dataclasses.replace(self, tokens=tokens) if tokens else _Resting(self)

    def read(
        self,
        params: Any,
        pages: Any,
        tokens: Int[Array, "B T"],
        new: Int[Array, "B"],
        rows: Rows,
        following: Int[Array, "B T"] | None = None,
        features: Float[Array, "B T F"] | None = None,
    ) -> Any:
        """The pages once they hold the first `new` of T tokens a row of a text, as `extend` appends them.

        Where it asks for `layers`, it is given the token after each and the features of each, of prompts and of what
        is made. The token after a row's last one may not be known yet, and be any.
        """
        return pages

    @abc.abstractmethod
    def propose(
        self, params: Any, pages: Any, texts: Texts, plan: SamplingPlan, adjust: Adjust | None
    ) -> tuple[Int[Array, "B K"], Int[Array, "B"], Any]:
        """Guess the K = `tokens` that follow each row.

        Args:
          params, pages: as `bind`, and `init_pages` or the last call, returned them.
          texts: the rows.
          plan, adjust: how the target samples, as `sample` takes them (static).

        Returns:
          The guesses; how many of each row count, 0 for none; and the pages.
        """


@dataclasses.dataclass(frozen=True)
class _Resting(Drafter):
    """What a drafter is while it drafts nothing."""

    drafter: Drafter
    tokens: int = 0

    @property
    def layers(self) -> Sequence[int]:
        return self.drafter.layers

    def read(self, *text: Any) -> Any:
        return self.drafter.read(*text)

    def propose(self, *_: Any) -> Any:
        raise TypeError("it drafts nothing")


def check_tokens(tokens: int) -> None:
    """ValueError for a number of tokens that cannot be drafted at once."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"tokens is {tokens}; a drafter guesses 1 to {MOST_TOKENS} tokens at once")
