"""A small model that drafts for a large one."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ...model.config import ModelConfig
from ...model.kv_specs import page_kinds
from ...model.loading import Model
from ..cache import KVCache, Rows, init_pages
from ..extend import extend
from ..sampling.draw import sample
from ..sampling.layout import SamplingPlan
from ..sampling.scores import Adjust
from .drafter import Drafter, Texts, check_tokens


@dataclasses.dataclass(frozen=True)
class ModelDrafter(Drafter):
    """A smaller model with the target's tokens. It samples as the target does, and with the same noise.

    Two models that draw with the same noise draw the same token with probability (1 - d) / (1 + d) at least, d the
    total variation between them (Daliri, Musco and Suresh 2024, arXiv 2408.07978).

    Args:
      model: as `load_model` returns it, on the target's devices.
      tokens: how many to guess at once, 1 to 15.

    Raises:
      ValueError: a number out of range.
    """

    model: Model
    tokens: int = 4

    def __post_init__(self):
        check_tokens(self.tokens)

    @property
    def configs(self) -> Sequence[ModelConfig]:
        return (self.model.config,)

    def bind(self, target: Model) -> tuple[Any, "_BoundDraft"]:
        _check_tokenizers(target, self.model)
        if self.model.mesh != target.mesh:
            raise ValueError(
                f"draft {self.model.name} is on {self.model.mesh or 'one device'} and target {target.name} on "
                f"{target.mesh or 'one device'}; load both with the same mesh"
            )
        config = self.model.config
        return self.model.params, _BoundDraft(
            self.tokens, config, tables_for(target, config, self.model.name), target.config.vocab_size
        )

    def propose(self, *_: Any) -> Any:
        raise TypeError("a ModelDrafter drafts for a target; bind it first")


@dataclasses.dataclass(frozen=True)
class PagedDrafter(Drafter):
    """Base of what drafts for a target with layers that keep keys and values.

    Attributes:
      config: of these layers.
      tables: of each of them, which of the target's block tables it uses.
    """

    tokens: int
    config: ModelConfig
    tables: tuple[int, ...]

    def init_pages(
        self, pages: Sequence[int], page_size: int, mesh: Mesh | None, kv_dtype: jax.typing.DTypeLike | None
    ) -> Any:
        table_of = dict(zip((layer.window for layer in self.config.layers), self.tables, strict=True))
        counts = [pages[table_of[window]] for window in page_kinds(self.config)]
        return init_pages(self.config, counts, page_size, mesh, kv_dtype)


@dataclasses.dataclass(frozen=True)
class _BoundDraft(PagedDrafter):
    """A draft model without its parameters.

    Attributes:
      vocab_size: of the target.
    """

    vocab_size: int

    def read(
        self, params: Any, pages: Any, tokens: Int[Array, "B T"], new: Int[Array, "B"], rows: Rows, *_: Any
    ) -> Any:
        cache = KVCache(pages, rows.replace(kinds=self.tables))
        return extend(params, self.config, tokens, new, cache, logits=None)[1].pages

    def propose(
        self, params: Any, pages: Any, texts: Texts, plan: SamplingPlan, adjust: Adjust | None
    ) -> tuple[Int[Array, "B K"], Int[Array, "B"], Any]:
        last, settings = texts.rows.lengths, texts.sampling.settings
        sampling = texts.sampling.replace(settings=settings.replace(logprobs=jnp.zeros_like(settings.logprobs)))

        def draw(tokens, cache, sampling):
            """The token after these, the last of which stands before it."""
            new = jnp.full_like(last, tokens.shape[1])
            logits, cache = extend(params, self.config, tokens, new, cache, form="decode")
            logits = self._of_target(logits)
            token, _, sampling = sample(logits, sampling, cache.lengths, plan, None, adjust, tokens[:, -1])
            return token, cache, sampling

        def step(carry, _):
            token, cache, sampling = carry
            carry = draw(token[:, None], cache, sampling)
            return carry, carry[0]

        # Two tokens: a round whose drafts were all accepted has left the one before the last out of the cache.
        tokens = jnp.take_along_axis(texts.history, last[:, None] + jnp.array([-1, 0]), axis=1, mode="clip")
        rows = texts.rows.replace(kinds=self.tables, lengths=jnp.maximum(last - 1, 0))  # 0 is a row without a request
        first = draw(tokens, KVCache(pages, rows), sampling)
        (_, cache, _), others = lax.scan(step, first, length=self.tokens - 1)
        guesses = jnp.concatenate([first[0][:, None], others.T], axis=1)
        return guesses, jnp.full_like(last, self.tokens), cache.pages

    def _of_target(self, logits: Float[Array, "B N"]) -> Float[Array, "B V"]:
        """Logits of the target's vocabulary, which may be padded to another size."""
        logits = logits[:, : self.vocab_size]
        missing = self.vocab_size - logits.shape[1]
        return jnp.pad(logits, ((0, 0), (0, missing)), constant_values=-jnp.inf)


def _check_tokenizers(target: Model, draft: Model) -> None:
    if target.tokenizer is None or draft.tokenizer is None:
        ours, theirs = target.config.vocab_size, draft.config.vocab_size
        if (target.tokenizer is None) != (draft.tokenizer is None) or ours != theirs:
            raise ValueError(
                f"target {target.name} has a vocabulary of {ours} and draft {draft.name} of {theirs}, and not both "
                "have a tokenizer that tells what the tokens are; take a draft with the target's tokenizer"
            )
        return
    ours, theirs = (model.tokenizer.backend.get_vocab(with_added_tokens=True) for model in (target, draft))
    if ours != theirs:
        text, token = min(ours.items() ^ theirs.items(), key=lambda entry: entry[1])
        raise ValueError(
            f"target {target.name} and draft {draft.name} have other tokens, of which {text!r} ({token}) is the first "
            "that only one of them has; take a draft with the target's tokenizer"
        )


def tables_for(target: Model, draft: ModelConfig, name: str) -> tuple[int, ...]:
    """Of each layer of a draft of that name, the place in the target's `page_kinds` of the pages that it uses.

    Raises:
      ValueError: a layer of the draft sees more positions than any of the target.
    """
    kinds = page_kinds(target.config)
    reach = {window: float("inf") if window is None else window for window in kinds}
    tables = []
    for layer in draft.layers:
        needed = float("inf") if layer.window is None else layer.window
        enough = [window for window in kinds if reach[window] >= needed]
        if not enough:
            raise ValueError(
                f"draft {name} has a layer that sees {layer.window or 'all'} positions, and target {target.name} "
                f"keeps {max(kinds)}; take a draft whose windows are no wider"
            )
        tables.append(kinds.index(min(enough, key=reach.get)))
    return tuple(tables)
