"""The weight-streaming kernel, interpreted; its schedule; and the widening that is only compiled, bit by bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic import gpu as mgpu
from matmul_cases import BF16, CASES, E2M1, F16, Case, exact

from ridgeline.pallas_kernels.matmul_mosaic import matmul_mosaic
from ridgeline.pallas_kernels.matmul_schedule import make_schedule
from ridgeline.pallas_kernels.matmul_widen import arranged, base, pairs, twice


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_is_dequantize_then_multiply(interpreter, case):
    x, weight = case.operands()
    weight = {"scales": None, "zeros": None} | weight
    out = matmul_mosaic(x, **weight, blocks=3, interpret=interpreter)  # fewer than steps, so that blocks share bands
    expected = exact(x, **weight)
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("blocks", [1, 5, 40])  # one does all; bands are cut anywhere; there are more than steps
def test_the_split_does_not_matter(interpreter, blocks):
    x, weight = Case("bfloat16", N=320, K=512).operands()
    out = matmul_mosaic(x, **weight, scales=None, zeros=None, blocks=blocks, interpret=interpreter)
    expected = exact(x, **weight)
    np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(8))
def test_blocks_take_every_step_once_in_equal_shares(seed):
    rng = np.random.default_rng(seed)
    N, K, blocks = 64 * int(rng.integers(1, 70)), 64 * int(rng.integers(1, 30)), int(rng.integers(1, 133))
    x, w = jax.ShapeDtypeStruct((1, K), BF16), jax.ShapeDtypeStruct((N, K), BF16)
    s = make_schedule(x, w, None, None, blocks=blocks)
    assert s.bands * s.rows == N
    assert s.steps * s.width == K
    assert s.blocks <= blocks
    total = s.bands * s.steps
    assert s.share == -(-total // blocks)
    assert (s.blocks - 1) * s.share < total <= s.blocks * s.share
    touched = {(step // s.steps, step // s.share) for step in range(total)}
    for band in range(s.bands):
        mine = [block for b, block in touched if b == band]
        assert (min(mine), max(mine)) == s.span(band)
        assert len(mine) <= s.pieces


def held(layout, shape):
    """[128 threads, registers, elements a register]: which element of an array of that shape each holds."""
    tiled = np.arange(np.prod(shape)).reshape(shape)
    for tile in layout.tiling.tiles:
        lead, grid = tiled.shape[: -len(tile)], tiled.shape[-len(tile) :]
        split = [n for size, t in zip(grid, tile, strict=True) for n in (size // t, t)]
        tiled = tiled.reshape(*lead, *split)
        k = len(lead)
        outer, inner = range(k, tiled.ndim, 2), range(k + 1, tiled.ndim, 2)
        tiled = tiled.transpose(*range(k), *outer, *inner)
    axes = [*layout.warp_dims, *layout.lane_dims, layout.vector_dim]
    last = len(axes) - 1
    moved = np.moveaxis(tiled, axes, range(-len(axes), 0))
    return np.moveaxis(moved.reshape(-1, 128, moved.shape[-1]) if last else moved, 0, 1)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn", "uint8", "float4_e2m1fn"])
def test_words_in_registers_become_the_operand_of_wgmma(kind, dtype):
    """Thread by thread, in Mosaic's own layouts: what `widen` does to registers is what `arranged` promises."""
    rng, kind = np.random.default_rng(0), jnp.dtype(kind)
    raw = rng.integers(0, 256, (64, 64)).astype(np.uint8)
    bits = 4 if kind in (jnp.uint8, jnp.float4_e2m1fn) else 8
    if kind == jnp.float8_e4m3fn:
        raw[(raw & 0x7F) == 0x7F] = 0x7E  # not NaN
    columns = raw.shape[1] * 8 // bits
    words = np.ascontiguousarray(raw.ravel()[held(mgpu.WGMMA_LAYOUT_UPCAST_2X, raw.shape)]).view(np.uint32)[..., 0]
    made = []
    for a, b in pairs(words.reshape(128, -1, 2), kind, dtype):  # words of rows 8 apart alternate
        a, b = (np.asarray(np.broadcast_to(n, words.reshape(128, -1, 2).shape), np.uint32) for n in (a, b))
        a, b = (n[..., None].view(np.uint16).view(dtype).astype(np.float32) for n in (a, b))
        made.append(a * b if kind in (jnp.float8_e4m3fn, jnp.float4_e2m1fn) else a - b)
    operand = np.zeros(64 * columns, np.float32)
    operand[held(mgpu.WGMMA_LAYOUT, (64, columns))] = np.stack(made, axis=2).reshape(128, -1, 2)

    if bits == 4:
        values = np.stack([raw % 16, raw // 16], axis=-1).reshape(64, -1)
        values = values.astype(np.float32) - 8 if kind == jnp.uint8 else E2M1[values]
    else:
        values = raw.view(kind).astype(np.float32)
    np.testing.assert_array_equal(operand.reshape(64, columns), arranged(jnp.asarray(values), bits))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bfloat16", "float16"])
def test_a_zero_point_is_the_base_of_its_row(dtype):
    zeros = np.arange(16, dtype=np.uint32)
    ((word, _), *_) = pairs(np.uint32(0x00050005), jnp.uint8, dtype)
    five, bases = (
        np.atleast_1d(n).astype(np.uint32).view(np.uint16).view(dtype).astype(np.float32)[::2]
        for n in (word, twice(zeros | base(dtype)))
    )
    np.testing.assert_array_equal(five - bases, 5.0 - zeros)
