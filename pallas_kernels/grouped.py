"""Products of rows that come in groups with one weight a group: what routed experts compute.

Takes `implementation` as `matmul` does, and weights in its forms, each with a leading axis of groups. Sums are float32.

Letters here: R rows, E groups, I inputs, O outputs; C, blocks and groups of scales as in `matmul`.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num, Shaped, UInt8

from .dispatch import Implementation, serve
from .matmul import check_operands, dequantized


@functools.partial(jax.named_call, name="grouped_matmul")
def grouped_matmul(
    x: Float[Array, "R I"],
    w: Num[Array, "E O C"],
    scales: Shaped[Array, "E blocks groups"] | None = None,
    zeros: UInt8[Array, "E O groups"] | None = None,
    *,
    sizes: Int[Array, "E"],
    out_dtype: jax.typing.DTypeLike | None = None,
    implementation: Implementation = None,
) -> Float[Array, "R O"]:
    """Each row of x times the transposed weight of its group.

    Args:
      x: rows in the order of their groups.
      w, scales, zeros: the weights, each as in `matmul`.
      sizes: rows of each group, none or more. Rows after those of all groups come out as zeros.
      out_dtype: of the result, x's own by default. The kernel for many rows rounds to x's before.
      implementation: see the module.

    Raises:
      NotImplementedError: "mosaic" does not serve the case.
      ValueError: no such implementation, or shapes and dtypes that make no weights.
    """
    check_operands("grouped_matmul", x, w, scales, zeros, lead=w.shape[:1])

    def mosaic(x, w, scales, zeros, sizes):
        from .grouped_mosaic import grouped_matmul_mosaic

        return grouped_matmul_mosaic(x, w, scales, zeros, sizes).astype(out_dtype or x.dtype)

    def plain(x, w, scales, zeros, sizes):
        ends, rows = jnp.cumsum(sizes), jnp.arange(x.shape[0])[:, None]

        def add(out, group):
            weight, start, end = group
            sums = jnp.einsum("ri,oi->ro", x.astype(jnp.float32), dequantized(*weight), precision=lax.Precision.HIGHEST)
            return jnp.where((start <= rows) & (rows < end), sums, out), None

        out = jnp.zeros((x.shape[0], w.shape[1]), jnp.float32)
        out, _ = lax.scan(add, out, ((w, scales, zeros), ends - sizes, ends))
        return out.astype(out_dtype or x.dtype)

    check = functools.partial(check_kernel, x, w, scales, zeros)
    return serve("grouped_matmul", implementation, mosaic, plain, check, x, w, scales, zeros, sizes)


def check_kernel(
    x: Float[Array, "R I"],
    w: Num[Array, "E O C"],
    scales: Shaped[Array, "E blocks groups"] | None = None,
    zeros: UInt8[Array, "E O groups"] | None = None,
) -> None:
    """NotImplementedError, with the reason, unless the kernels serve such products."""
    from .grouped_schedule import make_grouped_schedule

    make_grouped_schedule(x, w, scales, zeros)
