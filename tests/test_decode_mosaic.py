"""The decode kernel, interpreted: against a dense softmax in NumPy float64, for every variant and mixtures of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_cases import BF16, F16, FP8, INT8, Case, assert_close, dense
from ridgeline.pallas_kernels.decode_mosaic import decode_attention_mosaic
from ridgeline.pallas_kernels.decode_schedule import make_schedule

MIXED = (1, 130, 0, 256, 64, 17)
CASES = [
    # Head dims, page sizes, group sizes; rows of nothing, one position, a whole tile, a whole table.
    Case(H=64, S=16, G=1, K=3, lengths=MIXED),
    Case(H=80, S=32, G=3, lengths=MIXED),
    Case(H=96, S=128, G=16, lengths=MIXED),
    Case(H=128, S=64, G=4, K=2, lengths=MIXED),
    Case(H=192, S=128, G=8, lengths=MIXED),
    Case(H=256, S=16, G=2, lengths=MIXED),
    Case(H=128, S=64, G=9, lengths=MIXED, dtype=F16),
    # What scores go through, and pages that rows share.
    Case(S=64, G=5, lengths=MIXED, window=1),
    Case(S=32, G=5, lengths=(300, 70), window=100),
    Case(S=32, G=2, lengths=MIXED, soft_cap=2.0, scale=1.5),
    Case(S=128, G=7, K=2, lengths=MIXED, sinks=True),
    Case(S=32, G=4, lengths=(100, 90, 200), shared=2),
    # Several queries a row, in one block of columns and in several.
    Case(G=1, T=16, K=2, lengths=(200, 16, 3, 0)),
    Case(H=128, S=64, G=4, T=5, lengths=(90, 131), window=33, soft_cap=3.0, sinks=True),
    Case(H=256, S=128, G=5, T=16, lengths=(150, 10), window=70, sinks=True),
    Case(H=128, S=32, G=16, T=16, K=2, lengths=(100,), dtype=F16),
    # Quantized pages; scales of pages of 16 positions are gathered.
    Case(H=128, S=64, G=4, K=2, lengths=MIXED, kv=INT8),
    Case(H=64, S=16, G=8, K=2, lengths=MIXED, kv=FP8, sinks=True),
    Case(H=80, S=128, G=1, lengths=MIXED, kv=INT8, window=50),
    Case(H=96, S=32, G=16, lengths=MIXED, kv=FP8, soft_cap=5.0, dtype=F16),
    Case(H=192, S=64, G=2, T=4, lengths=(200, 7), kv=FP8),
    Case(H=256, S=16, G=4, lengths=MIXED, kv=INT8, dtype=F16),
]


def drawn(seed: int) -> Case:
    """A case with everything drawn at random."""
    rng = np.random.default_rng(seed)

    def one_of(*values):
        return values[rng.integers(len(values))]

    S, T = int(one_of(16, 32, 64, 128)), int(one_of(1, 1, 1, 2, 7, 16))
    shared = int(one_of(0, 0, 1, 2))
    rows = int(rng.integers(1, 6))
    longest = int(one_of(64, 200, 500))
    floor = shared * S if shared else 0
    return Case(
        H=int(one_of(64, 80, 96, 128, 192, 256)),
        S=S,
        K=int(rng.integers(1, 4)),
        G=int(rng.integers(1, 17)),
        T=T,
        lengths=tuple(int(n) for n in rng.integers(floor, floor + longest, rows)),
        dtype=one_of(BF16, F16),
        kv=one_of(None, INT8, FP8),
        window=one_of(None, None, int(rng.integers(1, longest))),
        soft_cap=one_of(None, None, 3.0),
        sinks=bool(rng.integers(2)),
        scale=one_of(None, 0.3),
        shared=shared,
    )


def run(case: Case, seed: int, interpret, blocks: int):
    arrays = case.arrays(seed)
    expected = dense(**arrays, starts=np.asarray(case.lengths) - case.T)
    options = arrays.pop("options")
    rows = jnp.moveaxis(arrays.pop("q"), 1, 2)  # [B, K, T, G, H]
    kernel = functools.partial(decode_attention_mosaic, options=options, queries=case.T, blocks=blocks)
    q = rows.reshape(*rows.shape[:2], case.T * case.G, case.H)
    out = jax.jit(functools.partial(kernel, interpret=interpret))(q, **arrays)
    return jnp.moveaxis(out.reshape(rows.shape), 2, 1), expected


@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_kernel_is_a_dense_softmax(interpreter, case):
    out, expected = run(case, CASES.index(case), interpreter, blocks=4)
    assert_close(out, expected, case.dtype)
    empty = np.asarray(case.lengths) == 0
    assert not np.asarray(out, np.float32)[empty].any()


@pytest.mark.parametrize("seed", range(16))
def test_any_mixture(interpreter, seed):
    case = drawn(seed)
    out, expected = run(case, seed, interpreter, blocks=int(np.random.default_rng(seed).integers(1, 9)))
    assert_close(out, expected, case.dtype)


@pytest.mark.parametrize("blocks", [1, 2, 7, 40])
def test_the_split_does_not_matter(interpreter, blocks):
    case = Case(H=64, S=32, G=4, K=2, lengths=(700, 3, 40))
    out, expected = run(case, 0, interpreter, blocks)
    assert_close(out, expected, case.dtype)


@pytest.mark.parametrize("seed", range(20))
def test_schedule_covers_every_tile_once_in_equal_shares(seed):
    rng = np.random.default_rng(seed)
    B, heads, blocks, tile = (int(rng.integers(1, n)) for n in (9, 5, 40, 65))
    queries, window = int(rng.integers(1, 9)), None if seed % 2 else int(rng.integers(1, 300))
    lengths = rng.integers(0, 600, B) * rng.integers(0, 2, B)
    schedule = make_schedule(
        jnp.asarray(lengths), queries=queries, window=window, tile=tile, heads=heads, blocks=blocks
    )
    work, rows, pieces = (np.asarray(x) for x in schedule)

    needed = {}  # what the windows of a row's queries reach
    for b, length in enumerate(lengths):
        oldest = 0 if window is None else max(0, length - queries - window + 1)
        needed[b] = set(range(oldest // tile, -(-length // tile)))
    units = [(b, h) for b in range(B) for h in range(heads)]
    read, partials = [], set()
    for block, (row, head, at, count) in enumerate(work):
        for _ in range(count):
            read.append((row, head, rows[row, 0] + at))
            unit = units.index((row, head))
            partials.add((unit, block))
            assert pieces[unit, 0] <= block <= pieces[unit, 1]
            at += 1
            if at == rows[row, 1]:
                at, head = 0, head + 1
                if head == heads:
                    row, head = row + 1, 0
    assert len(read) == len(set(read))
    for b, h in units:
        tiles = {tile for row, head, tile in read if (row, head) == (b, h)}
        assert needed[b] <= tiles
        assert len(tiles) == max(1, len(needed[b]))
    assert work[:, 3].max() == -(-len(read) // blocks)  # nobody has more than an equal share
    slots = [unit + block for unit, block in partials]
    assert len(slots) == len(set(slots))
    assert len(partials) == sum(last - first + 1 for first, last in pieces)


def test_lengths_change_without_recompiling():
    traces = []

    def counted(lengths):
        traces.append(None)
        return make_schedule(lengths, queries=1, window=None, tile=64, heads=2, blocks=8)

    compiled = jax.jit(counted)
    for lengths in ([1, 2], [5000, 3], [0, 0]):
        compiled(jnp.asarray(lengths))
    assert len(traces) == 1
