"""Grouped products: the reference and the interpreted kernel against a loop over groups; the table; who serves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matmul_cases import BF16, F16, Case, exact

from ridgeline.pallas_kernels import dispatch
from ridgeline.pallas_kernels.grouped import grouped_matmul
from ridgeline.pallas_kernels.grouped_mosaic import grouped_matmul_mosaic
from ridgeline.pallas_kernels.grouped_schedule import make_grouped_schedule, make_table

SIZES = {  # of groups of 24 rows
    "even": (6, 6, 6, 6),
    "one group takes all": (0, 24, 0, 0),
    "a row each": (1, 1, 1, 1),
    "some take none": (0, 9, 0, 15),
    "a single row": (0, 0, 1, 0),
    "none": (0, 0, 0, 0),
}
FORMS = [
    Case("bfloat16", K=192),
    Case("float16", dtype=F16),
    Case("int8", K=192, dtype=F16),
    Case("fp8", N=128, K=256, group=128, block_rows=64),
    Case("int4", N=128, K=256, group=32, zeros=True),
    Case("int4", K=256, group=128, scale_dtype=BF16),
]


def operands(case, groups, rows):
    """Activations and `groups` weights, by the names of `grouped_matmul`."""
    case = dataclasses.replace(case, M=rows, N=groups * case.N)
    x, weights = case.operands()
    weights = {name: part.reshape(groups, -1, part.shape[-1]) for name, part in weights.items()}
    return x, {"w": weights.pop("values"), "scales": None, "zeros": None} | weights


def looped(x, w, scales, zeros, sizes):
    """Group by group, in float64."""
    out, end = np.zeros((x.shape[0], w.shape[1])), 0
    for n, size in enumerate(sizes):
        parts = (None if part is None else part[n] for part in (w, scales, zeros))
        out[end : end + size], end = exact(x[end : end + size], *parts), end + size
    return out


def near(out, expected, tolerance):
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_reference_is_a_loop_over_groups(sizes):
    x, weights = operands(FORMS[0], 4, 24)
    out = grouped_matmul(x, **weights, sizes=jnp.array(sizes), out_dtype="float32", implementation="reference")
    near(out, looped(x, **weights, sizes=sizes), 2e-6)


@pytest.mark.parametrize("case", FORMS, ids=str)
def test_reference_takes_every_form(case):
    x, weights = operands(case, 3, 10)
    out = grouped_matmul(x, **weights, sizes=jnp.array([3, 0, 5]), out_dtype="float32", implementation="reference")
    near(out, looped(x, **weights, sizes=(3, 0, 5)), 2e-6)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_interpreted_kernel_of_few_rows(interpreter, sizes):
    x, weights = operands(FORMS[0], 4, 24)
    out = grouped_matmul_mosaic(x, **weights, sizes=jnp.array(sizes), blocks=3, interpret=interpreter)
    near(out, looped(x, **weights, sizes=sizes), 3e-6)


@pytest.mark.parametrize("case", FORMS[1:], ids=str)
def test_interpreted_kernel_takes_every_form(interpreter, case):
    x, weights = operands(case, 3, 11)
    out = grouped_matmul_mosaic(x, **weights, sizes=jnp.array([7, 0, 2]), blocks=3, interpret=interpreter)
    near(out, looped(x, **weights, sizes=(7, 0, 2)), 3e-6)


@pytest.mark.parametrize(
    ("case", "sizes"),
    [
        (Case("bfloat16", N=128), (0, 331, 1, 190)),  # tiles of 128 rows
        (Case("bfloat16"), (515, *[0] * 29)),  # of 32
        (Case("int8", dtype=F16), (100, 0, 13, 400)),
        (Case("int4", group=64, zeros=True), (5, 501, 9)),
    ],
    ids=str,
)
def test_interpreted_kernel_of_many_rows(interpreter, case, sizes):
    x, weights = operands(case, len(sizes), 515 + 8 * (sum(sizes) > 515))
    out = grouped_matmul_mosaic(x, **weights, sizes=jnp.array(sizes), blocks=3, interpret=interpreter)
    assert out.dtype == x.dtype
    near(out, looped(x, **weights, sizes=sizes), 5e-3 if case.dtype == BF16 else 1e-3)


@pytest.mark.parametrize("seed", range(12))
def test_every_row_meets_its_weight_once_in_equal_shares(seed):
    """What the kernel does, as counts: steps of a band that each row was given, by partial sum."""
    rng = np.random.default_rng(seed)
    E, blocks = int(rng.integers(1, 20)), int(rng.integers(1, 133))
    R = int(rng.integers(1, 400) if seed % 2 else rng.integers(513, 4000))
    N, K = 64 * int(rng.integers(1, 20)), 64 * int(rng.integers(1, 20))
    sizes = rng.multinomial(rng.integers(0, R + 1), rng.dirichlet(np.full(E, 0.3)))
    x, w = jax.ShapeDtypeStruct((R, K), BF16), jax.ShapeDtypeStruct((E, N, K), BF16)
    g = make_grouped_schedule(x, w, None, None, blocks=blocks)
    s = g.product
    table, pieces = jax.device_get(jax.jit(make_table, static_argnums=(0, 2))(g, jnp.asarray(sizes), R))
    groups = np.repeat(np.arange(E + 1), [*sizes, R - sizes.sum()])  # of rows
    assert np.all((pieces > 0) == (groups < E)[:, None])
    assert pieces.max() <= g.pieces

    counts = np.zeros((g.pieces, R, s.bands), int)
    for block, (start, steps) in enumerate(table.shares):
        for position in range(start // s.steps, -(-(start + steps) // s.steps)):
            band, first, first_block, low, high = table.units[position]
            assert first % 8 == 0
            assert first + s.columns <= max(-(-R // 8) * 8, s.columns)
            rows = slice(first + low, first + high)
            assert 0 <= low < high <= s.columns
            assert np.all(groups[rows] == band // s.bands)
            done = min(start + steps, (position + 1) * s.steps) - max(start, position * s.steps)
            assert 0 <= block - first_block < pieces[rows, band % s.bands].min()
            counts[block - first_block, rows, band % s.bands] += done
    assert np.all(counts.sum(axis=0) == s.steps * (groups < E)[:, None])
    assert np.all((counts > 0) == (np.arange(g.pieces)[:, None, None] < pieces))
    each = table.shares[:, 1]
    if g.whole:
        assert each.max() - each.min() <= s.steps
    else:
        assert each.sum() <= len(each) * max(each.max(), g.least)
        assert each.max() == max(g.least, -(-each.sum() // s.blocks)) or each.sum() <= g.least


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scales": None}, "scales are missing"),
        ({"scales": jnp.ones((2, 5, 1))}, "they must divide a weight of"),
        ({"x": jnp.zeros((2, 96))}, "x has 96 inputs and the weight 64"),
        ({"implementation": "mosaik"}, "mosaik"),
    ],
    ids=str,
)
def test_operands_that_make_no_products(change, reason):
    weights = {"w": jnp.zeros((2, 64, 64), jnp.int8), "scales": jnp.ones((2, 64, 1))}
    given = {"x": jnp.zeros((2, 64)), **weights, "sizes": jnp.array([1, 1])}
    with pytest.raises((ValueError, TypeError), match=reason):
        grouped_matmul(**given | change)


def test_the_kernel_serves_hopper_and_says_what_it_refuses(monkeypatch):
    monkeypatch.setattr(dispatch, "current_device", lambda: dispatch.Device("gpu", "NVIDIA H200", 132))

    def program(case):
        x, weights = operands(case, 2, 10)
        return str(jax.jit(lambda x: grouped_matmul(x, **weights, sizes=jnp.array([4, 5]))).trace(x).jaxpr)

    assert "name=grouped_matmul_mosaic" in program(Case("int8"))
    dispatch._say_once.cache_clear()
    with pytest.warns(UserWarning, match="96 outputs; the kernel takes multiples of 64"):
        assert "grouped_matmul_mosaic" not in program(Case("int8", N=96))
