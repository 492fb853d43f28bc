"""Texts through the cache as they are written, with the logits after every token: nothing is drawn."""

import functools
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.loading import Model
from ..model.params import Params
from .cache import KVCache, init_cache
from .extend import extend
from .loop import settle

Texts = Sequence[Sequence[int] | Int[np.ndarray, "_"]]
"""Token ids of each row."""


class TeacherForced:
    """Rows that begin and end together, on a cache that batch after batch reuses.

    Args:
      model: as `load_model` returns it.
      rows: how many run together; rounded up to what the mesh divides.
      max_length: longest text, in tokens.
      kv_dtype: of cached keys and values, as `init_cache` takes it.
    """

    def __init__(self, model: Model, rows: int, max_length: int, kv_dtype: jax.typing.DTypeLike | None = None):
        data = 1 if model.mesh is None else model.mesh.shape["data"]
        self.model, self.rows = model, -(-rows // data) * data
        self._cache = init_cache(model.config, self.rows, max_length, mesh=model.mesh, kv_dtype=kv_dtype)

    def all_logits(self, texts: Texts, width: int) -> Iterator[tuple[int, Float[Array, "B T V"]]]:
        """Run at most `rows` texts, `width` tokens at a time: the first token's place, and the logits after each."""
        ends = [len(text) for text in texts]
        of_rows = {"lengths": [], "max_lengths": ends, "contexts": ends}
        self._cache = self._cache.replace(**{name: self._of_rows(values) for name, values in of_rows.items()})
        for start in range(0, max(ends), width):
            tokens, new = np.zeros((self.rows, width), np.int32), np.zeros(self.rows, np.int32)
            for row, text in enumerate(texts):
                part = text[start : start + width]
                tokens[row, : len(part)], new[row] = part, len(part)
            logits, self._cache = _extend(self.model.params, self.model.config, tokens, new, self._cache)
            settle(self.model, logits)
            yield start, logits

    def _of_rows(self, values: Sequence[int]) -> Int[Array, "B"]:
        """One value a row, 0 past those given, placed as the cache's rows are."""
        padded = np.zeros(self.rows, np.int32)
        padded[: len(values)] = values
        return jax.device_put(padded, None if self.model.mesh is None else self._cache.lengths.sharding)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _extend(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], new: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B T V"], KVCache]:
    return extend(params, config, tokens, new, cache, logits="all")
