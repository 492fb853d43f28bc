"""What the attention ops take: one layer's pages of the KV cache, and what a layer asks of attention."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Num


class Pages(NamedTuple):
    """The cached keys and values of one layer, a pytree; also of whatever stands for its arrays, such as their specs.

    Letters: P pages, K KV heads, S positions a page, H head dimensions.

    Attributes:
      k, v: [P, K, S, H], in the query's dtype or a wider one; or int8 or float8_e4m3fn with scales, float8_e4m3fn also
        as its bytes, uint8.
      k_scales, v_scales: [P, K, S] float32: a number times the scale of its position and head is the key or value. None
        where pages hold keys and values themselves.
    """

    k: Any
    v: Any
    k_scales: Any = None
    v_scales: Any = None

    def numbers(self) -> "Pages":
        """The same with the numbers that bytes of float8 stand for."""
        return self._replace(k=_numbers(self.k), v=_numbers(self.v))


@dataclasses.dataclass(frozen=True)
class AttentionOptions:
    """What one layer asks of attention. Static under jit.

    Attributes:
      scale: multiplies q . k.
      window: each query sees itself and the window - 1 positions before it; None sees all before it.
      soft_cap: scores become soft_cap * tanh(score / soft_cap); None leaves them.
    """

    scale: float
    window: int | None = None
    soft_cap: float | None = None


def _numbers(pages: Num[Array, "P K S H"]) -> Num[Array, "P K S H"]:
    return lax.bitcast_convert_type(pages, jnp.float8_e4m3fn) if pages.dtype == jnp.uint8 else pages
