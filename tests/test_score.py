"""Scores of texts and continuations, held to `forward` and to transformers; what is computed, and what compiled."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.benchmarks.replay import counted_compilations
from ridgeline.decode import buckets, teacher_forced
from tiny import byte_tokenizer, tiny_config, tiny_model

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "parity"
EXACT = 2e-5
rng = np.random.default_rng(11)
TEXTS = [rng.integers(0, 509, n).tolist() for n in (90, 2, 17, 131, 18, 40, 5)]


def log_probs(model: rl.Model, ids: list[int]) -> np.ndarray:
    """[T, V], by the pass that knows no cache; at few padded lengths."""
    padded = np.zeros((1, -(-len(ids) // 160) * 160), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(jax.nn.log_softmax(rl.forward(model.params, model.config, padded)[0, : len(ids)]))


def check(score: rl.Score, model: rl.Model, ids: list[int], first: int, top: int = 0) -> None:
    """All figures of the tokens from number `first` on; tokens whose values round alike may change places."""
    expected, targets = log_probs(model, ids)[first - 1 : -1], np.array(ids[first:])
    own = np.take_along_axis(expected, targets[:, None], axis=1)
    assert score.tokens.tolist() == targets.tolist()
    assert score.logprobs.dtype == np.float32
    np.testing.assert_allclose(score.logprobs, own[:, 0], atol=EXACT)
    assert score.sum == pytest.approx(own.sum(), abs=1e-3)
    assert (score.ranks > (expected > own + 2 * EXACT).sum(1)).all()
    assert (score.ranks <= 1 + (expected > own - 2 * EXACT).sum(1)).all()
    assert (score.greedy == (score.ranks == 1)).all()
    best = -np.sort(-expected, axis=1)[:, :top]
    assert score.top_ids.shape == best.shape
    np.testing.assert_allclose(score.top_logprobs, best, atol=EXACT)
    np.testing.assert_allclose(np.take_along_axis(expected, score.top_ids, axis=1), best, atol=2 * EXACT)


@pytest.fixture
def computed(monkeypatch):
    """[rows, width] of every program that runs, and the tokens that each appends."""
    programs, run = [], teacher_forced._append

    def counted(params, configs, pages, rows, tokens, new, *others, **options):
        programs.append((*tokens.shape, int(new.sum())))
        return run(params, configs, pages, rows, tokens, new, *others, **options)

    monkeypatch.setattr(teacher_forced, "_append", counted)
    return programs


def test_ragged_texts_have_the_figures_of_forward(model, monkeypatch):
    monkeypatch.setattr(buckets, "PREFILL_CHUNK", 64)  # so that texts take several programs
    seen = []
    scores = rl.score(model, TEXTS, top=3, progress=lambda *counts: seen.append(counts))
    for score, ids in zip(scores, TEXTS, strict=True):
        check(score, model, ids, 1, top=3)
    total = sum(len(ids) - 1 for ids in TEXTS)
    assert seen == sorted(set(seen))
    assert seen[-1] == (total, total)


def test_contexts_that_continuations_share_are_computed_once(model, computed):
    contexts = [rng.integers(0, 509, n).tolist() for n in (70, 1, 64, 65, 130, 12)]
    continuations = [[rng.integers(0, 509, n).tolist() for n in (1, 4, 20, 3)] for _ in contexts]
    contexts.append(contexts[0])  # again, with one alone
    continuations.append([1, 2, 3])
    scores = rl.score(model, contexts, continuations, max_batch_size=8)
    for context, own, of_one in zip(contexts[:-1], continuations, scores, strict=False):
        for continuation, score in zip(own, of_one, strict=True):
            check(score, model, context + continuation, len(context))
    check(scores[-1], model, contexts[-1] + [1, 2, 3], 70)
    shared = sum(len(context) - 1 for context in contexts[:-1])
    assert sum(new for *_, new in computed) == shared + 6 * (1 + 4 + 20 + 3) + 3
    assert max(rows for rows, *_ in computed) == 8


def test_what_does_not_fit_the_cache_at_once_takes_turns(model, monkeypatch, computed):
    monkeypatch.setattr(teacher_forced, "default_cache_tokens", lambda *_: 128)
    contexts = [ids[:60] for ids in TEXTS if len(ids) >= 60]
    continuations = [[[n, n + 1] for n in range(30)] for _ in contexts]
    scores = rl.score(model, contexts, continuations, max_batch_size=4)
    for context, own, of_one in zip(contexts, continuations, scores, strict=True):
        for continuation, score in zip(own, of_one, strict=True):
            check(score, model, context + continuation, 60)
    # Of six pages a context takes one, so that it is computed again for each five of its continuations.
    assert sum(new for *_, new in computed) == sum(30 // 5 * 59 + 30 * 2 for _ in contexts)


def test_few_programs_whatever_the_lengths_and_none_the_second_time(computed):
    model = tiny_model(tiny_config(embed_dim=40))
    texts = [rng.integers(0, 509, n).tolist() for n in rng.integers(2, 500, 149)]
    with counted_compilations() as compilations:
        first = rl.score(model, texts)
        assert compilations() <= 12
    assert len({(rows, width) for rows, width, _ in computed}) <= 7
    assert all(rows * width <= 1024 for rows, width, _ in computed)
    with counted_compilations() as compilations:
        again = rl.score(model, texts)
        assert compilations() == 0
    assert [score.sum for score in first] == [score.sum for score in again]


@pytest.mark.parametrize(
    "file",
    ["gemma2/expected", "qwen2_window/expected"]
    + [f"{name}/{file}" for name in ("llama_dynamic", "phi3_longrope") for file in ("expected", "expected_short")],
)
def test_distributions_are_those_of_transformers(file):
    expected = np.load(FIXTURES / f"{file}.npz")
    model = rl.load_model((FIXTURES / file).parent, dtype="float32")
    prompts, greedy = expected["prompts"].tolist(), expected["greedy"].tolist()
    # The last token is only scored: the model reads as many as transformers has.
    of_prompts = [[[*row, 0], [*row, 1]] for row in greedy]
    of_first_tokens = [[*prompt[1:], *row, 0] for prompt, row in zip(prompts, greedy, strict=True)]
    contexts = prompts + [prompt[:1] for prompt in prompts]
    *shared, first, second = rl.score(model, contexts, of_prompts + of_first_tokens, top=509)
    for row, whole in enumerate((first, second)):
        logprobs = np.asarray(jax.nn.log_softmax(expected["logits"][row]))
        distributions = [(whole, position, logprobs[n]) for n, position in enumerate(expected["positions"])]
        distributions += [(score, 0, logprobs[-1]) for score in shared[row]]
        for score, place, of_transformers in distributions:
            by_id = np.empty(509, np.float32)
            by_id[score.top_ids[place]] = score.top_logprobs[place]
            np.testing.assert_allclose(by_id, of_transformers, atol=2e-4)
        assert all(score.greedy[-33:-1].all() for score in (whole, *shared[row]))


def test_contexts_are_not_shared_over_the_border_of_longrope():
    """Past its pre-training context a text has other keys from its first token on."""
    model = rl.load_model(FIXTURES / "phi3_longrope", dtype="float32")
    border = next(layer.rope.original_max_position for layer in model.config.layers)
    context, longer = TEXTS[0][: border - 2], TEXTS[3][:30]
    together = rl.score(model, [context], [[longer[:2], longer]])[0]
    for score, own in zip(together, (longer[:2], longer), strict=True):
        alone = rl.score(model, [context], [own])[0]
        np.testing.assert_allclose(score.logprobs, alone.logprobs, atol=1e-4)


def test_residual_is_that_of_transformer(model):
    shift = jnp.linspace(-1, 1, model.config.embed_dim)

    def steer(x, n):
        return x + shift if n == 1 else x

    found = rl.score(model, [TEXTS[0]], residual=steer)[0]
    x, _ = rl.transformer(model.params, model.config, jnp.asarray([TEXTS[0]]), residual=steer)
    logprobs = jax.nn.log_softmax(rl.unembed(model.params, model.config, x))[0]
    np.testing.assert_allclose(found.logprobs, logprobs[np.arange(89), TEXTS[0][1:]], atol=2e-5)
    assert abs(found.logprobs - log_probs(model, TEXTS[0])[np.arange(89), TEXTS[0][1:]]).max() > 1


def test_texts_are_cut_as_in_the_harness():
    """Blanks move to the continuation; what the tokenizer merges over the border is cut by the context's length."""
    model = dataclasses.replace(tiny_model(tiny_config(vocab_size=256)), tokenizer=byte_tokenizer())
    encode = model.tokenizer.encode
    prompts = ["The king  ", "A", "The king", encode("The king"), encode("The king"), "naïve"]
    continuations = [["was", "sat"], " fox", [1, 2], encode("  was"), "  sat", "té"]
    (was, sat), fox, ids, *same, cut = rl.score(model, prompts, continuations)
    assert [score.tokens.tolist() for score in (was, sat, fox)] == [encode(text) for text in ("  was", "  sat", " fox")]
    assert ids.tokens.tolist() == [1, 2]
    assert cut.tokens.tolist() == encode("té")
    np.testing.assert_allclose([was.sum, sat.sum], [score.sum for score in same], rtol=1e-6)
    first, second = rl.score(model, "The king", ["  was", "  sat"])[0]
    np.testing.assert_allclose([first.sum, second.sum], [was.sum, sat.sum], rtol=1e-5)
    assert rl.score(model, "The king")[0].tokens.tolist() == encode("he king")
    assert rl.score(model, []) == []


def test_what_is_not_finite_is_an_error_that_names_the_text(model):
    broken = dataclasses.replace(
        model, params=model.params | {"embedding": model.params["embedding"].at[7].set(jnp.nan)}
    )
    with pytest.raises(FloatingPointError, match=r"prompt 1: the log-probability of token \d+ .* is nan, .* float32"):
        rl.score(broken, [[1, 2, 3], [1, 7, 5]])
    with pytest.raises(FloatingPointError, match=r"text 1, by the reference: the log-probability"):
        rl.evaluate(model, [[1, 2, 3], [1, 7, 5]], against=broken)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("some text",), {}, "prompt 0 is text, but the model has no tokenizer"),
        (([[1, 2], [3]],), {}, "prompt 1 has 1 tokens, of which those from number 1 on are to be scored"),
        (([[1, 509]],), {}, "prompt 0 has token id 509; the vocabulary is 0 to 508"),
        (([[1]], [[[2], [510]]]), {}, "prompt 0, continuation 1 has token id 510"),
        (([[1]], [[[2], []]]), {}, "prompt 0, continuation 1 has 1 tokens, of which those from number 1"),
        (([[]], [[2]]), {}, "prompt 0, continuation 0 has 1 tokens, of which those from number 0"),
        (([[1], [2]], [[2]]), {}, "got 2 prompts and 1 continuations"),
        (([[1] * 514],), {}, "prompt 0 has 514 tokens; the model reads 512 and predicts one more"),
        (([[1, 2]],), {"top": 510}, "top is 510; it must be between 0 and 509"),
        (([[1, 2]],), {"max_batch_size": 0}, "max_batch_size is 0"),
        (([[1, 2]],), {"kv_dtype": "int3"}, "kv_dtype 'int3' is not known"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        rl.score(model, *arguments, **options)
