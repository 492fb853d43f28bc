"""The `attend` of prefill and decode: write the new keys and values into their pages, then attend over the pages."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax
from jaxtyping import Array, Float

from ..model.config import ModelConfig
from ..model.kv_specs import kv_specs
from ..model.transformer import AttentionSpec, LayerwiseAttend
from ..pallas_kernels.attention import decode_attention, prefill_attention
from ..sharding.rules import mesh_of, shard_map
from .cache import Rows, write_pages

Form = Literal["prefill", "decode"]
"""How new tokens attend over pages: as blocks of queries, or as a few of them for which the pages are read once."""

_ROWS = ("batch",)
_HEADS = ("batch", None, "kv_heads")


@struct.dataclass
class CachedAttend(LayerwiseAttend):
    """An `Attend` whose state is a layer's entry of `KVCache.pages`.

    On a mesh it runs on each device's own rows and heads, so that neither the write nor the kernel communicates.

    Attributes:
      rows: of the cache; its pages come as the state.
      new: [B], how many of the T tokens of each row to write.
      positions: [B, T], where they stand.
      config: the model (static).
      form: how to attend (static); "decode" takes up to 16 tokens.
    """

    rows: Rows
    new: Any
    positions: Any
    config: ModelConfig = struct.field(pytree_node=False)
    form: Form = struct.field(pytree_node=False)

    def __call__(
        self,
        q: Float[Array, "B T K G H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        spec: AttentionSpec,
        state: Any,
    ) -> tuple[Float[Array, "B T K G H"], Any]:
        T, tables = q.shape[1], self.rows.table(spec.layer)
        leaf = jax.tree.leaves(state)[0]
        mesh, specs = mesh_of(leaf), kv_specs(self.config, "fp8" if leaf.dtype == jnp.uint8 else leaf.dtype)

        def local(q, k, v, pages, tables, positions, new, sinks):
            if mesh is not None and tables is not None:
                # Tables name pages of the whole pool; each data shard holds a run of them.
                tables = tables - lax.axis_index("data") * pages.k.shape[0]
            pages = write_pages(pages, k, v, tables, positions, jnp.arange(T) < new[:, None])
            starts = positions[:, 0]
            if self.form == "prefill":
                return prefill_attention(q, pages, tables, starts, starts + new, spec.options, sinks=sinks), pages
            queries = q[:, 0] if T == 1 else q
            # All T: of a row with fewer, the others' results are nobody's, and no token of the row sees past its own.
            out = decode_attention(queries, pages, tables, starts + T * (new > 0), spec.options, sinks=sinks)
            return out.reshape(q.shape), pages

        layer_axes = jax.tree.map(lambda leaf: leaf.axes, specs[spec.layer])
        in_axes = (_HEADS, _HEADS, _HEADS, layer_axes, None if tables is None else _ROWS, _ROWS, _ROWS)
        in_axes += (None if spec.sinks is None else ("kv_heads",),)
        with jax.named_scope("cached_attention"):
            run = shard_map(local, mesh, in_axes, (_HEADS, layer_axes))
            return run(q, k, v, state, tables, self.positions, self.new, spec.sinks)
