"""The seam between speculation and whatever guesses the tokens to come."""

import abc
from collections.abc import Sequence
from typing import Any

import jax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Int

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
      sampling: what each row asks for, and what it has sampled.
    """

    rows: Rows
    history: Any
    sampling: SamplingState


class Drafter(abc.ABC):
    """Guesses the next tokens of every row. Hashable: a static argument of the programs that use it.

    What it guesses changes no token of the output, only how many come at once.

    Attributes:
      tokens: how many it guesses, 1 to 15.
      configs: models whose keys and values it keeps, in pages of its own.
    """

    tokens: int
    configs: Sequence[ModelConfig] = ()

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

    def read(self, params: Any, pages: Any, tokens: Int[Array, "B T"], new: Int[Array, "B"], rows: Rows) -> Any:
        """The pages once they hold the first `new` of T tokens a row of a text, as `extend` appends them."""
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


def check_tokens(tokens: int) -> None:
    """ValueError for a number of tokens that cannot be drafted at once."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"tokens is {tokens}; a drafter guesses 1 to {MOST_TOKENS} tokens at once")
