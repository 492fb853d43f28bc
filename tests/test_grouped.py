"""Grouped products: the reference and the interpreted kernel against a loop over groups; the table; who serves."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from matmul_cases import BF16, F16, Case, exact

from ridgeline.pallas_kernels import dispatch
from ridgeline.pallas_kernels.grouped import grouped_matmul
from ridgeline.pallas_kernels.grouped_mosaic import grouped_matmul_mosaic
from ridgeline.pallas_kernels.grouped_schedule import make_grouped_schedule, make_table, pieces
from ridgeline.pallas_kernels.matmul_mosaic import _Share
from ridgeline.sharding.hlo import num_elements, parse
from ridgeline.sharding.targets import compile_for_target, target_mesh

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
    Case("mxfp4", K=192, group=32),
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
        (Case("bfloat16"), (0, 331, 1, 190)),
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


@pytest.mark.parametrize("seed", range(8))
def test_every_row_meets_its_weight_once_in_equal_shares(seed):
    """Each step that a block of the kernel takes is counted, at the rows, band and partial sum that it goes into."""
    rng = np.random.default_rng(seed)
    E, blocks = int(rng.integers(1, 20)), int(rng.integers(1, 133))
    R = int(rng.integers(1, 400) if seed % 2 else rng.integers(513, 2000))
    N, K = 64 * int(rng.integers(1, 12)), 64 * int(rng.integers(1, 8))
    sizes = rng.multinomial(rng.integers(0, R + 1), rng.dirichlet(np.full(E, 0.3)))
    x, w = jax.ShapeDtypeStruct((R, K), BF16), jax.ShapeDtypeStruct((E, N, K), BF16)
    g = make_grouped_schedule(x, w, None, None, blocks=blocks)
    s = g.product
    most = -(-g.tiles * s.bands // s.blocks) * s.steps + s.share

    @jax.jit
    def plan(sizes):
        table, tile, real = make_table(g, sizes, R)

        def steps(_):
            share = _Share(s, table)
            return share.count, jax.vmap(share.at)(jnp.arange(most))

        taken = jax.vmap(steps, axis_name="block")(jnp.arange(s.blocks))
        return *taken, real, jnp.where(real[:, None], 1 if g.whole else pieces(g, table.ends[-1], tile), 0)

    taken, (units, step), real, number = jax.device_get(plan(jnp.asarray(sizes)))
    assert max(taken) <= most
    done = np.arange(most) < taken[:, None]  # [blocks, most]
    band, piece, start, low, high = (np.broadcast_to(part, done.shape)[done] for part in jax.tree.leaves(units))
    assert np.all((start % 8 == 0) & (0 <= low) & (low < high) & (high <= s.columns))
    assert np.all((0 <= start) & (start + s.columns <= max(-(-R // 8) * 8, s.columns)))
    rows = start[:, None] + np.arange(s.columns)  # [steps, columns]
    mine = (start + low)[:, None] <= rows
    mine &= rows < (start + high)[:, None]
    groups = np.repeat(np.arange(E + 1), [*sizes, R - sizes.sum()])  # of rows
    at = [np.broadcast_to(part[:, None], rows.shape)[mine] for part in (piece, band, step[done])]
    assert np.all(groups[rows[mine]] == at[1] // s.bands)
    counts = np.zeros((g.pieces, R, s.bands, s.steps), int)
    np.add.at(counts, (at[0], rows[mine], at[1] % s.bands, at[2]), 1)
    assert np.all(real == (groups < E))
    assert np.all(counts.sum(axis=0) == real[:, None, None])
    assert np.all(counts.any(axis=3) == (np.arange(g.pieces)[:, None, None] < number))
    assert max(taken) - min(taken) <= s.steps if g.whole else max(taken) <= max(s.share, -(-sum(taken) // s.blocks))


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


@pytest.mark.parametrize("rows", [64, 8192])
def test_compiled_for_an_h200_it_holds_its_result_and_no_more(plugin, rows):
    """Few rows: partial sums, of half the bytes of a weight; no product over all experts, and a few small kernels."""
    E, I, O = 256, 2048, 512  # noqa: E741
    place = NamedSharding(target_mesh("h200"), PartitionSpec())
    shapes = (((rows, I), BF16), ((E, O, I), BF16), ((E,), jnp.int32))
    operands = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in shapes]
    product = jax.jit(lambda x, w, sizes: grouped_matmul(x, w, sizes=sizes, implementation="mosaic"))
    compiled = compile_for_target(product.lower(*operands))
    text = compiled.as_text()
    assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) == 1
    assert not re.search(r"\bdot\(|cublas|__gemm", text)
    most = O * I * 2 / 2 if rows == 64 else rows * O * 2
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * most
    big = [shape for _, shape in parse(text).written() if num_elements(shape) > 1]  # scalars: bodies of reductions
    assert len(big) <= 16
