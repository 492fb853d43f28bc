"""Weights in every form that `matmul` takes, and their product in NumPy float64."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

BF16, F16 = jnp.bfloat16, jnp.float16
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


@dataclasses.dataclass(frozen=True)
class Case:
    """M rows of `dtype` by a weight of N outputs and K inputs.

    `group` inputs and `block_rows` outputs share a scale (None: all inputs) of `scale_dtype`.
    """

    kind: str
    M: int = 3
    N: int = 64
    K: int = 128
    group: int | None = None
    block_rows: int = 1
    zeros: bool = False
    dtype: Any = BF16
    scale_dtype: Any = jnp.float32

    def __str__(self) -> str:
        parts = [self.kind, f"{self.M}x{self.N}x{self.K}", jnp.dtype(self.dtype).name]
        parts += [f"group {self.group}"] * (self.group is not None) + [f"rows {self.block_rows}"] * (
            self.block_rows > 1
        )
        return " ".join(parts + ["zeros"] * self.zeros)

    def operands(self) -> tuple[Any, dict[str, Any]]:
        """Activations, and the weight by the names of `matmul`. Among the values are the extreme ones of the dtype."""
        rng = np.random.default_rng(self.M * self.N + self.K)
        x = jnp.asarray(rng.normal(size=(self.M, self.K)), self.dtype)
        if self.kind in ("bfloat16", "float16"):
            return x, {"values": jnp.asarray(rng.normal(size=(self.N, self.K)), self.kind)}
        grid = (self.N // self.block_rows, 1 if self.group is None else self.K // self.group)
        weight = {"scales": jnp.asarray(rng.uniform(0.5, 1.5, grid), self.scale_dtype)}
        if self.kind == "int8":
            weight["values"] = jnp.asarray(rng.integers(-128, 128, (self.N, self.K)), jnp.int8)
        elif self.kind == "fp8":
            values = rng.normal(size=(self.N, self.K)) * 2.0 ** rng.integers(-10, 8, (self.N, self.K))
            weight["values"] = jnp.asarray(values.clip(-448, 448), jnp.float8_e4m3fn)
        else:
            weight["values"] = jnp.asarray(rng.integers(0, 256, (self.N, self.K // 2)), jnp.uint8)
            if self.kind == "mxfp4":
                weight["scales"] = jnp.asarray(2.0 ** rng.integers(-3, 4, grid), jnp.float8_e8m0fnu)
            if self.zeros:
                weight["zeros"] = jnp.asarray(rng.integers(0, 16, grid), jnp.uint8)
        return x, weight


CASES = [
    # No N is a multiple of 256 or an odd one of 192, which four or three warpgroups would multiply: XLA on a machine of
    # two cores has two threads for those that the interpreter runs, and two that wait for a third would keep it from
    # running.
    # Formats; rows that fill 8 columns, that do not, and 64; weights of one tile and of several.
    Case("bfloat16", M=1, N=384, K=192),
    Case("float16", M=17, K=96, dtype=F16),
    Case("int8", M=8, N=128, K=256),
    Case("int8", M=40, K=192, dtype=F16),
    Case("fp8", M=2, N=320),
    Case("fp8", K=256, group=128, block_rows=64, N=128),
    Case("fp8", M=1, N=384, K=384, group=128, block_rows=128, dtype=F16),
    Case("int4", N=320, K=512, group=128, scale_dtype=BF16),
    Case("int4", M=64, K=256, group=32, zeros=True),
    Case("int4", M=9, N=128, K=384, group=64, dtype=F16, scale_dtype=F16),
    Case("int4", N=128, K=768, group=128, zeros=True),
    Case("int4", N=64, K=128, group=128, scale_dtype=BF16),  # one group: the scale of the output
    Case("mxfp4", M=17, N=128, K=192, group=32),
    Case("mxfp4", K=512, group=32, dtype=F16),
]


def exact(x: Any, values: Any, scales: Any = None, zeros: Any = None) -> np.ndarray:
    """x @ w.T for w = (value - zero) * scale, in float64."""
    packed = values.dtype == jnp.uint8
    if packed:
        values = np.asarray(values)
        values = np.stack([values % 16, values // 16], axis=-1).reshape(len(values), -1)
    w = np.asarray(values).astype(np.float64)

    def wide(entries):
        entries = np.asarray(entries).astype(np.float64)
        return np.kron(entries, np.ones((w.shape[0] // entries.shape[0], w.shape[1] // entries.shape[1])))

    if scales is not None and scales.dtype == jnp.float8_e8m0fnu:
        w = E2M1[w.astype(int)]
    elif packed:
        w = w - (8 if zeros is None else wide(zeros))
    if scales is not None:
        w = w * wide(scales)
    return np.asarray(x).astype(np.float64) @ w.T
