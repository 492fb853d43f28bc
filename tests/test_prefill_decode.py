"""prefill and decode_step against teacher-forced `forward`, and the contracts of the compiled step."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.decode.extend import NO_LOGITS
from ridgeline.model import kv_specs
from tiny import tiny_config, tiny_model

T = 70
LENGTHS = np.array([70, 33, 5], np.int32)
ROWS = np.arange(3)
PAGE = 16


@pytest.fixture(scope="module")
def tokens() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).integers(0, 509, (3, T)), jnp.int32)


def prefill(model, tokens, lengths, cache):
    return rl.prefill(model.params, model.config, tokens, jnp.asarray(lengths, jnp.int32), cache)


def step(model, tokens, cache):
    return rl.decode_step(model.params, model.config, tokens, cache)


def prefilled(model, tokens, max_length=100):
    return prefill(model, tokens, LENGTHS, rl.init_cache(model.config, 3, max_length, page_size=PAGE))


def shuffled(cache: rl.KVCache) -> rl.KVCache:
    """The same empty cache with its pages dealt out at random, between spare pages full of garbage."""
    rows, per_row = cache.block_tables.shape
    pages = rows * per_row + 5
    tables = np.random.default_rng(1).permutation(pages)[: rows * per_row].reshape(rows, per_row)
    fill = lambda leaf: jnp.full((pages, *leaf.shape[1:]), 1e4, leaf.dtype)  # noqa: E731
    return cache.replace(
        pages=jax.tree.map(fill, cache.pages),
        block_tables=jnp.asarray(tables, jnp.int32),
    )


def test_ragged_prefill_gives_the_logits_of_forward(model, tokens):
    logits, cache = prefilled(model, tokens)
    expected = rl.forward(model.params, model.config, tokens)[ROWS, LENGTHS - 1]
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)


@pytest.mark.parametrize("chunk", [1, 24, 64])
def test_prefill_in_chunks_is_one_prefill(model, tokens, chunk):
    expected = rl.forward(model.params, model.config, tokens)
    cache = rl.init_cache(model.config, 3, 100, page_size=PAGE)
    for start in range(0, T if chunk > 1 else 6, chunk):
        part = jnp.pad(tokens[:, start : start + chunk], ((0, 0), (0, max(0, start + chunk - T))))
        new = np.clip(LENGTHS - start, 0, chunk)
        logits, cache = prefill(model, part, new, cache)
        active = new > 0
        np.testing.assert_allclose(logits[active], expected[ROWS, start + new - 1][active], atol=1e-4)
        assert (logits[~active] == NO_LOGITS).all()


@pytest.mark.parametrize("arrange", [lambda cache: cache, shuffled], ids=["dense", "paged"])
def test_decode_gives_the_logits_of_forward(model, tokens, arrange):
    expected = rl.forward(model.params, model.config, tokens)
    start = np.array([40, 33, 5])
    cache = arrange(rl.init_cache(model.config, 3, 100, page_size=PAGE))
    logits, cache = prefill(model, tokens, start, cache)
    np.testing.assert_allclose(logits, expected[ROWS, start - 1], atol=1e-4)
    for i in range(30):
        logits, cache = step(model, tokens[ROWS, start + i], cache)
        np.testing.assert_allclose(logits, expected[ROWS, start + i], atol=1e-4)


def test_decode_from_an_empty_cache_starts_at_position_zero(model, tokens):
    logits, _ = step(model, tokens[:, 0], rl.init_cache(model.config, 3, 20))
    np.testing.assert_allclose(logits, rl.forward(model.params, model.config, tokens)[:, 0], atol=1e-4)


def test_a_full_row_is_refused_and_disturbs_nothing(model, tokens):
    logits, cache = prefilled(model, tokens)
    cache = cache.replace(max_lengths=jnp.array([70, 100, 6], jnp.int32))
    _, cache = step(model, tokens[:, 0], cache)  # row 0 was full, row 2 is now
    before = jax.tree.map(np.asarray, cache)
    logits, cache = step(model, tokens[:, 1], cache)
    assert (logits == NO_LOGITS).all(axis=1).tolist() == [True, False, True]
    assert cache.lengths.tolist() == [70, 35, 6]
    written = np.zeros(before.num_pages, bool)
    written[cache.block_tables[1]] = True
    for old, new in zip(*map(jax.tree.leaves, (before.pages, cache.pages)), strict=True):
        np.testing.assert_array_equal(new[~written], old[~written])


@pytest.mark.parametrize("bad", [71, -1, 31], ids=["longer than T", "negative", "beyond max_lengths"])
def test_prefill_refuses_a_row_that_does_not_fit(model, tokens, bad):
    _, cache = prefilled(model, tokens)
    before = jax.tree.map(np.asarray, cache)
    logits, cache = prefill(model, tokens, [bad, 4, 0], cache)
    assert (logits == NO_LOGITS).all(axis=1).tolist() == [True, False, True]
    assert cache.lengths.tolist() == [70, 37, 5]
    np.testing.assert_array_equal(cache.pages[0].k[cache.block_tables[0]], before.pages[0].k[before.block_tables[0]])


@pytest.mark.parametrize(
    "rope",
    [
        rl.RopeConfig(20, kind="dynamic", factor=4.0, original_max_position=32),
        rl.RopeConfig(
            20,
            kind="longrope",
            original_max_position=32,
            short_factor=tuple(1 + i / 10 for i in range(10)),
            long_factor=tuple(2.0 + i for i in range(10)),
            attention_factor=1.1,
        ),
    ],
    ids=lambda rope: rope.kind,
)
@pytest.mark.parametrize("room", [T, 200])
def test_length_dependent_rope_follows_the_declared_length_and_no_room(rope, room, tokens):
    # Positions before and after the switch are rotated alike, so chunks and single steps agree with one pass.
    model = tiny_model(tiny_config(layers=(rl.LayerConfig(rope),) * 2))
    expected = rl.forward(model.params, model.config, tokens)
    cache = rl.init_cache(model.config, 3, room, page_size=PAGE)
    short, cache = prefill(model, tokens[:, :20], [20, 20, 20], cache)  # none declared: a row is as long as it is
    np.testing.assert_allclose(short, rl.forward(model.params, model.config, tokens[:, :20])[:, -1], atol=1e-4)
    cache = rl.init_cache(model.config, 3, room, page_size=PAGE).replace(contexts=jnp.full(3, T))
    _, cache = prefill(model, tokens[:, :20], [20, 20, 20], cache)
    logits, cache = prefill(model, tokens[:, 20:68], [48, 48, 48], cache)
    np.testing.assert_allclose(logits, expected[:, 67], atol=1e-4)
    logits, cache = step(model, tokens[:, 68], cache)
    np.testing.assert_allclose(logits, expected[:, 68], atol=1e-4)


def test_bfloat16_stays_close_to_float32(model, tokens):
    config = model.config.replace(dtype="bfloat16")
    low = dataclasses.replace(model, config=config, params=jax.tree.map(lambda a: a.astype("bfloat16"), model.params))
    expected, expected_cache = prefilled(model, tokens)
    logits, cache = prefill(low, tokens, LENGTHS, rl.init_cache(config, 3, 100, page_size=PAGE, kv_dtype="bfloat16"))
    assert logits.dtype == jnp.float32
    spread = float(jnp.std(expected))
    assert float(jnp.abs(logits - expected).max()) < 0.15 * spread
    expected, _ = step(model, tokens[:, 0], expected_cache)
    logits, _ = step(low, tokens[:, 0], cache)
    assert float(jnp.abs(logits - expected).max()) < 0.15 * spread


def test_each_shape_compiles_once(tokens):
    model = tiny_model(tiny_config(vocab_size=500), seed=1)
    for _ in range(2):
        for width in (16, 32):
            before = rl.prefill._cache_size()
            cache = rl.init_cache(model.config, 3, 64, page_size=PAGE)
            for lengths in ([3, 2, 1], [9, 0, 16]):
                _, cache = prefill(model, tokens[:, :width] % 500, lengths, cache)
            assert rl.prefill._cache_size() - before <= 1
    before = rl.decode_step._cache_size()
    for _ in range(5):
        _, cache = step(model, tokens[:, 0] % 500, cache)
    assert rl.decode_step._cache_size() - before == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_compiled_step_updates_the_cache_in_place(dtype):
    config = tiny_config(dtype=dtype)
    params = jax.eval_shape(lambda: rl.init_params(config, jax.random.key(0)))
    cache = jax.eval_shape(lambda: rl.init_cache(config, 4, 16384))
    compiled = rl.decode_step.lower(params, config, jax.ShapeDtypeStruct((4,), jnp.int32), cache).compile()
    memory = compiled.memory_analysis()
    rows = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.rows))
    assert memory.alias_size_in_bytes == cache.nbytes + rows
    leaf = cache.pages[1].k
    # Room for scores and logits, not for one leaf of the cache.
    assert memory.temp_size_in_bytes < leaf.size * leaf.dtype.itemsize / 2
    shape = ",".join(map(str, leaf.shape))
    assert not re.findall(rf"\[{shape}\][^ ]* (?:copy|transpose|convert)\(", compiled.as_text())


def test_ids_that_the_vocabulary_does_not_have_are_refused(model):
    """Where they are at hand, and count."""
    cache, params, config = rl.init_cache(model.config, 2, 20), model.params, model.config
    tokens, lengths = np.array([[1, 2], [3, 509]]), np.array([2, 2])
    for given in (tokens, jnp.asarray(tokens), -tokens):
        with pytest.raises(ValueError, match=r"forward: tokens has id (509|-1); the vocabulary is 0 to 508"):
            rl.forward(params, config, given)
        with pytest.raises(ValueError, match=r"prefill: tokens has id (509|-1)"):
            rl.prefill(params, config, given, lengths, cache)
    rl.prefill(params, config, tokens, np.array([2, 1]), cache)  # the last one is padding
    with pytest.raises(ValueError, match="decode_step: tokens has id 509"):
        rl.decode_step(params, config, tokens[1], cache)


def test_a_cache_that_was_consumed_says_so(model):
    cache = rl.init_cache(model.config, 2, 20)
    rl.decode_step(model.params, model.config, np.array([1, 2]), cache)
    for call in (
        lambda: rl.decode_step(model.params, model.config, np.array([1, 2]), cache),
        lambda: rl.fork(cache, [0, 0]),
        lambda: cache.read(0),
    ):
        with pytest.raises(ValueError, match="the cache was consumed by an earlier call"):
            call()


def test_mismatched_batches_are_refused(model, tokens):
    cache = rl.init_cache(model.config, 2, 20)
    with pytest.raises(ValueError, match=r"3 rows .* cache of 2"):
        prefill(model, tokens, LENGTHS, cache)
    with pytest.raises(ValueError, match=r"decode got 3 rows .* cache of 2"):
        step(model, tokens[:, 0], cache)
    with pytest.raises(ValueError, match="max_length is 0"):
        rl.init_cache(model.config, 2, 0)


@pytest.mark.parametrize("arrange", [lambda cache: cache, shuffled], ids=["dense", "paged"])
def test_a_few_tokens_a_row_in_the_decode_form_are_those_of_single_steps(model, tokens, arrange):
    """As drafts are verified: rows take different numbers of them, and what is not taken leaves no trace."""
    start, new, T = np.array([40, 33, 5]), np.array([5, 0, 2]), 5
    _, cache = prefill(model, tokens, start, arrange(rl.init_cache(model.config, 3, 42, page_size=PAGE)))
    cache = cache.replace(max_lengths=jnp.array([45, 42, 42]))
    drafts = jnp.stack([tokens[row, n : n + T] for row, n in enumerate(start)])
    extend = jax.jit(functools.partial(rl.extend, config=model.config, form="decode", logits="all"))
    logits, cache = extend(model.params, tokens=drafts, new=jnp.asarray(new), cache=cache)
    expected = rl.forward(model.params, model.config, tokens)
    for row, (n, taken) in enumerate(zip(start, new, strict=True)):
        np.testing.assert_allclose(logits[row, :taken], expected[row, n : n + taken], atol=1e-4)
        assert (logits[row, taken:] == NO_LOGITS).all()
    logits, _ = step(model, tokens[ROWS, start + new], cache.replace(max_lengths=jnp.full(3, 48)))
    np.testing.assert_allclose(logits, expected[ROWS, start + new], atol=1e-4)


def test_tables_that_are_put_in_are_written_and_read_by(model, tokens):
    """Also where the cache stored none, its pages lying in row order; and rows may change places."""
    expected, _ = step(model, tokens[:, 0], prefilled(model, tokens)[1])
    cache = rl.init_cache(model.config, 3, 100, page_size=PAGE)
    _, cache = prefill(model, tokens, LENGTHS, cache.replace(block_tables=cache.block_tables[::-1]))
    order = jnp.array([2, 0, 1])
    cache = cache.replace(rows=jax.tree.map(lambda leaf: leaf[order], cache.rows))
    logits, _ = step(model, tokens[order, 0], cache)
    np.testing.assert_allclose(logits, expected[order], atol=1e-5)


def test_rows_share_the_pages_that_their_tables_share(model, tokens):
    """Three rows begin alike: one of them writes the beginning, all read it, and each writes on a page of its own."""
    beginning = jnp.broadcast_to(tokens[:1, : 2 * PAGE], (3, 2 * PAGE))
    tables = [[3, 0, 1], [3, 0, 4], [3, 0, 2]]
    cache = rl.init_cache(model.config, 3, 3 * PAGE, page_size=PAGE, block_tables=tables, num_pages=5)
    assert cache.num_pages == 5
    _, cache = prefill(model, beginning, [2 * PAGE, 0, 0], cache)
    cache = cache.replace(lengths=jnp.full(3, 2 * PAGE))
    own = prefill(model, beginning, [2 * PAGE] * 3, rl.init_cache(model.config, 3, 3 * PAGE, page_size=PAGE))[1]
    for n in range(4):
        logits, cache = step(model, tokens[:, n], cache)
        expected, own = step(model, tokens[:, n], own)
        np.testing.assert_allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize("tables", [[[0, 1]], [[0, 1, 2]] * 2, [[0, -1]] * 2, [[0, 4]] * 2, np.ones((2, 2))], ids=str)
def test_block_tables_that_are_none_are_refused(model, tables):
    with pytest.raises(
        ValueError, match=r"block_tables is \w+ \(., .\) from .*; give integers from 0 to 3 .* 2 rows of 2"
    ):
        rl.init_cache(model.config, 2, 20, page_size=10, block_tables=tables)


@pytest.mark.parametrize(("kv", "atol"), [("float32", 1e-5), ("int8", 0.06), ("fp8", 0.4)])
def test_a_cache_reads_back_as_the_keys_and_values_of_forward(model, tokens, kv, atol):
    kept = []

    def attend(q, k, v, spec, state):
        kept.append((k, v))
        return rl.attend_to_tokens(q, k, v, spec, state)

    rl.transformer(model.params, model.config, tokens, attend=attend)
    tables = np.random.default_rng(1).permutation(15).reshape(3, 5)
    empty = rl.init_cache(model.config, 3, T, page_size=PAGE, kv_dtype=kv, block_tables=tables)
    _, cache = prefill(model, tokens, LENGTHS, empty)
    for layer, exact in enumerate(kept):
        for read, part in zip(cache.read(layer), exact, strict=True):
            assert (read.shape, read.dtype) == ((3, 80, *part.shape[2:]), jnp.float32)
            for row, length in enumerate(LENGTHS):
                np.testing.assert_allclose(read[row, :length], part[row, :length], atol=atol)
                assert not read[row, length:].any()


def test_layers_with_a_window_keep_what_it_reaches(monkeypatch, model):
    """Pages are used in turn: a long row gives the logits of one for which everything is kept."""
    monkeypatch.setattr("ridgeline.decode.cache.PREFILL_CHUNK", 16)
    monkeypatch.setattr("ridgeline.decode.cache.pages_per_row", functools.partial(kv_specs.pages_per_row, new=16))
    few = rl.init_cache(model.config, 2, 120, page_size=4)
    own = np.arange(60).reshape(2, 30)
    all_kept = rl.init_cache(model.config, 2, 120, page_size=4, block_tables=own)
    assert [pages.k.shape[0] for pages in few.pages] == [2 * 8, 2 * 30]  # 9 + 16 positions in pages of 4, and one
    tokens = np.random.default_rng(0).integers(0, 509, (2, 112)).astype(np.int32)
    for start in range(0, 96, 16):
        new = np.array([16, 0 if start == 32 else 15], np.int32)
        part = tokens[:, start : start + 16]
        logits, few = rl.prefill(model.params, model.config, part, new, few)
        expected, all_kept = rl.prefill(model.params, model.config, part, new, all_kept)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    for step in range(96, 112):
        logits, few = rl.decode_step(model.params, model.config, tokens[:, step], few)
        expected, all_kept = rl.decode_step(model.params, model.config, tokens[:, step], all_kept)
        np.testing.assert_allclose(logits, expected, atol=1e-5)
    for kept, whole in zip(few.read(0), all_kept.read(0), strict=True):  # the first row has 112 positions
        np.testing.assert_allclose(kept[0, 103:112], whole[0, 103:112], atol=1e-5)
    with pytest.raises(ValueError, match="got 17 tokens a row; layers with a window keep pages for 16"):
        rl.prefill(model.params, model.config, tokens[:, :17], np.array([17, 17], np.int32), few)
