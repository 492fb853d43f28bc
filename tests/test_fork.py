"""`fork`, what may be replaced in a cache, and beam search: against the whole sequences read anew, and transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.decode.fork import _fork
from tiny import tiny_config, tiny_model

rng = np.random.default_rng(5)


def logits_of(model, texts):
    """After each text, read without a cache."""
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        padded[row, : len(text)] = text
    whole = rl.forward(model.params, model.config, padded)
    return np.stack([whole[row, len(text) - 1] for row, text in enumerate(texts)])


def prefilled(model, texts, max_length, **options):
    cache = rl.init_cache(model.config, len(texts), max_length, **options)
    tokens = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
    return rl.prefill(model.params, model.config, tokens, np.array(list(map(len, texts)), np.int32), cache)


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_forked_rows_go_on_as_their_parents_texts(kv_dtype):
    """A tree that forks at every other step: rows die, are shared, and come back several times."""
    model = tiny_model()
    texts = [rng.integers(0, 400, n).tolist() for n in (9, 1, 16, 5)]
    logits, cache = prefilled(model, texts, 40, page_size=4, kv_dtype=kv_dtype)
    for step in range(12):
        if step % 2 == 0:
            rows = rng.integers(0, len(texts), 4).tolist()
            texts, cache = [list(texts[row]) for row in rows], rl.fork(cache, rows)
        tokens = rng.integers(0, 400, 4).astype(np.int32)
        texts = [[*text, token] for text, token in zip(texts, tokens.tolist(), strict=True)]
        logits, cache = rl.decode_step(model.params, model.config, tokens, cache)
    expected = logits_of(model, texts)
    if kv_dtype is None:
        np.testing.assert_allclose(logits, expected, atol=2e-4)
    else:  # the rounded keys of a row that was never forked
        alone = [prefilled(model, [text], 40, page_size=4, kv_dtype=kv_dtype)[0][0] for text in texts]
        np.testing.assert_allclose(logits, np.stack(alone), atol=0.05)
    assert cache.lengths.tolist() == list(map(len, texts))


def test_full_pages_are_shared_and_the_page_in_use_is_copied():
    model = tiny_model()
    _, cache = prefilled(model, [list(range(10)), [7]], 16, page_size=4)
    cache = rl.fork(cache, [0, 0])
    tables = np.asarray(cache.block_tables)
    assert (tables[0, :2] == tables[1, :2]).all()
    assert not np.isin(tables[0, 2:], tables[1, 2:]).any()
    keys, _ = cache.read(0)
    np.testing.assert_array_equal(keys[0, :10], keys[1, :10])


def test_more_rows_than_there_were_and_fewer():
    model = tiny_model()
    text = rng.integers(0, 400, 11).tolist()
    _, cache = prefilled(model, [text], 32, page_size=8)
    cache = rl.fork(cache, [0, 0, 0])
    tokens = np.array([5, 6, 7], np.int32)
    logits, cache = rl.decode_step(model.params, model.config, tokens, cache)
    np.testing.assert_allclose(logits, logits_of(model, [[*text, t] for t in (5, 6, 7)]), atol=2e-4)
    logits, cache = rl.decode_step(model.params, model.config, np.array([9], np.int32), rl.fork(cache, np.array([1])))
    np.testing.assert_allclose(logits, logits_of(model, [[*text, 6, 9]]), atol=2e-4)


def test_pages_that_are_used_in_turn_are_copied():
    config = tiny_config(max_position=2048)
    model = tiny_model(config)
    texts = [rng.integers(0, 400, n).tolist() for n in (1100, 30)]
    _, cache = prefilled(model, [text[:1000] for text in texts], 1200, page_size=16)
    rest = np.zeros((2, 100), np.int32)
    rest[0] = texts[0][1000:]
    _, cache = rl.prefill(model.params, config, rest, np.array([100, 0], np.int32), cache)
    assert cache.rows.most_new is not None
    cache = rl.fork(cache, [0, 0])
    tokens = np.array([[3, 4], [5, 6], [7, 8]], np.int32)
    for step in tokens:
        logits, cache = rl.decode_step(model.params, config, step, cache)
    np.testing.assert_allclose(logits, logits_of(model, [[*texts[0], *tokens[:, row]] for row in (0, 1)]), atol=3e-4)


def test_rows_are_rewound_and_tables_replaced():
    model = tiny_model()
    texts = [rng.integers(0, 400, 12).tolist() for _ in range(2)]
    _, cache = prefilled(model, texts, 16, page_size=4)
    cache = cache.replace(lengths=jnp.array([5, 12]))
    logits, cache = rl.decode_step(model.params, model.config, np.array([1, 2], np.int32), cache)
    np.testing.assert_allclose(logits, logits_of(model, [[*texts[0][:5], 1], [*texts[1], 2]]), atol=2e-4)
    swapped = cache.replace(block_tables=cache.block_tables[::-1], lengths=cache.lengths[::-1])
    logits, _ = rl.decode_step(model.params, model.config, np.array([3, 4], np.int32), swapped)
    np.testing.assert_allclose(logits, logits_of(model, [[*texts[1], 2, 3], [*texts[0][:5], 1, 4]]), atol=2e-4)


def test_one_program_whatever_is_forked():
    model = tiny_model()
    _, cache = prefilled(model, [[1], [2, 3]], 8)
    cache = rl.fork(rl.fork(cache, [1, 1]), [0, 0])
    count = _fork._cache_size()
    rl.fork(cache, [0, 1])
    assert _fork._cache_size() == count


def test_what_fork_refuses():
    _, cache = prefilled(tiny_model(), [[1], [2, 3]], 8)
    for rows, message in (([2], "there is no row 2"), ([-1], "no row -1"), ([], "rows is")):
        with pytest.raises(ValueError, match=message):
            rl.fork(cache, rows)
    with pytest.raises(ValueError, match="beam_width is 0"):
        rl.beam_search(tiny_model(), [[1]], beam_width=0)


@pytest.mark.parametrize(("ends", "length_penalty"), [("often", 1.0), ("often", 2.0), ("never", 1.0)])
def test_beams_are_those_of_transformers(tmp_path, ends, length_penalty):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4, bos_token_id=1, eos_token_id=list(range(2, 12)), pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = rl.load_model(tmp_path, dtype="float32")
    for prompt in ([44], list(range(12, 40))):
        options = {} if ends == "often" else {"eos_token_id": -1}
        expected = theirs.generate(
            torch.tensor([prompt]), num_beams=4, num_return_sequences=4, do_sample=False, max_new_tokens=12,
            length_penalty=length_penalty, output_scores=True, return_dict_in_generate=True, **options,
        )  # fmt: skip
        (found,) = rl.beam_search(ours, [prompt], 4, 12, length_penalty=length_penalty, ignore_eos=ends == "never")
        width = expected.sequences.shape[1]
        # Theirs are padded with the first of the ends.
        assert [s.tokens + [2] * (width - len(s.tokens)) for s in found.sequences] == expected.sequences.tolist()
        np.testing.assert_allclose([s.score for s in found.sequences], expected.sequences_scores, rtol=1e-4)
