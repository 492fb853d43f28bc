"""Log probabilities, the draw and its independence of the batch, and what is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from ridgeline.decode.sampling import scores
from ridgeline.decode.sampling.draw import SampleLogprobs, gumbel_noise, sample
from ridgeline.decode.sampling.layout import SamplingPlan
from ridgeline.decode.sampling.params import SamplingParams
from ridgeline.decode.sampling.state import SamplingState, count, make_sampling_state
from sampling_reference import INF, one_row, reference_noise, reference_scores

# Log probabilities


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_the_models_own(temperature):
    B, V, n = 32, 41, 5
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(B, V)) * 3).astype(np.float32)
    logits[:, 17] = logits[:, 3]
    params = SamplingParams(temperature=temperature, top_k=30, logprobs=n, logit_bias={17: 6.0}, repetition_penalty=1.3)
    state, plan = make_sampling_state([params] * B, [[1, 2]] * B, range(B), V)
    tokens, reported, _ = sample(jnp.asarray(logits), state, jnp.full(B, 2), plan=plan)
    assert isinstance(reported, SampleLogprobs)
    expected = scipy.special.log_softmax(logits.astype(np.float64), axis=-1)
    for row, token in enumerate(np.asarray(tokens).tolist()):
        order = sorted(range(V), key=lambda t: (-logits[row, t], t))
        np.testing.assert_allclose(reported.chosen[row], expected[row, token], atol=2e-5)
        assert reported.rank[row] == order.index(token) + 1
        assert reported.top_ids[row, :n].tolist() == order[:n]
        np.testing.assert_allclose(reported.top[row, :n], expected[row, order[:n]], atol=2e-5)
    assert (np.asarray(tokens) == 17).any()  # the bias was felt, so that logprobs after it would have been seen


def test_logprobs_of_forbidden_tokens_and_widths():
    token, reported = one_row([-INF, 0.0, 0.0, -INF], SamplingParams(temperature=0, logprobs=4))
    assert (token, reported.rank, reported.top_ids.tolist()) == (1, 1, [1, 2, 0, 3])
    np.testing.assert_allclose(reported.top, [-np.log(2), -np.log(2), -INF, -INF], rtol=1e-6)
    _, none = one_row([1.0, 2.0], SamplingParams(temperature=0, logprobs=0))
    assert none.chosen < 0

    def width(*asked, vocab_size=1000):
        params = [SamplingParams(logprobs=n) for n in asked]
        return make_sampling_state(params, [[]] * len(asked), [0] * len(asked), vocab_size)[1].logprobs

    assert [width(n) for n in (None, 0, 1, 32, 33, 1000)] == [0, 32, 32, 32, 128, 1000]
    assert (width(None, 3, 0), width(3, 129, None), width(3, vocab_size=5)) == (32, 512, 5)


# The draw


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 2.5},
        {"top_k": 4},
        {"top_p": 0.7},
        {"min_p": 0.15},
        {"temperature": 1.7, "min_p": 0.05, "top_k": 9, "top_p": 0.8},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(params):
    V, draws = 16, 8192
    logits = np.random.default_rng(5).normal(size=V).astype(np.float32) * 1.5
    params = SamplingParams(seed=11, **params)
    state, plan = make_sampling_state([params], [[]], [0], V)
    one = jax.vmap(lambda n: sample(jnp.asarray(logits[None]), state, n[None], plan)[0][0])
    found = np.bincount(np.asarray(jax.jit(one)(jnp.arange(draws))), minlength=V)
    _, scores, _ = reference_scores(logits, params, (), ())
    expected = np.exp(scores) / np.exp(scores).sum() * draws
    assert not found[expected == 0].any()
    tested = expected >= 5
    found, expected = (np.append(a[tested], a[~tested].sum()) for a in (found, expected))
    nonzero = expected > 0
    assert scipy.stats.chisquare(found[nonzero], expected[nonzero]).pvalue > 1e-4


def test_noise_is_standard_gumbel_and_fine_where_it_decides():
    V = 2**20
    state, _ = make_sampling_state([SamplingParams(seed=1)], [[]], [0], V)
    noise = np.asarray(gumbel_noise(state.settings.seeds, jnp.array([[0]]), V))[0, 0]
    assert noise.dtype == np.float32
    # Below -1 the uniform number is so near 1 that float32 is coarse; such noise decides nothing.
    fine = noise > -1
    np.testing.assert_allclose(noise[fine], reference_noise(1, 0, V)[fine], rtol=1e-4, atol=1e-5)
    assert scipy.stats.kstest(noise[: 2**15], scipy.stats.gumbel_r.cdf).pvalue > 1e-4
    # The largest thousand, among which the draw is made: 23 random bits a token would give some sixty ties.
    assert len(set(np.sort(noise)[-1000:].tolist())) > 995


def test_seeds_and_positions_draw_apart():
    V = 64
    logits = jnp.zeros((8, V))
    state, plan = make_sampling_state([SamplingParams()] * 8, [[]] * 8, [0, 1, 2**32, 2**33, 2**64 - 1, 7, 7, 7], V)
    positions = jnp.array([5, 5, 5, 5, 5, 5, 5, 50])
    runs = [np.asarray(sample(logits, state, positions + n, plan=plan)[0]) for n in range(12)]
    columns = [tuple(int(run[row]) for run in runs) for row in range(8)]
    assert columns[5] == columns[6]  # one seed and one position
    assert len(set(columns)) == 7


def test_params_seed_comes_before_the_given_seeds():
    given = make_sampling_state([SamplingParams(seed=5), SamplingParams()], [[], []], [1, 6], 4)[0]
    np.testing.assert_array_equal(given.settings.seeds, [[0, 5], [0, 6]])


# Independence of the batch


REQUESTS = {
    "plain": SamplingParams(seed=1),
    "warm": SamplingParams(temperature=0.7, seed=2),
    "filtered": SamplingParams(top_k=20, top_p=0.9, min_p=0.02, seed=3),
    "penalized": SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=-0.5, seed=4),
    "biased": SamplingParams(logit_bias={3: 4.0}, logprobs=3, seed=5),
    "held": SamplingParams(min_tokens=9, stop_token_ids=[0, 1], seed=6),
    "greedy": SamplingParams(temperature=0.0),
}


@functools.partial(jax.jit, static_argnames="plan")
def run_steps(logits, state, start, plan):
    def step(carry, xs):
        n, step_logits = xs
        tokens, _, carry = sample(step_logits, carry, start + n, plan)
        return carry, tokens

    return jax.lax.scan(step, state, (jnp.arange(len(logits)), logits))[1]


def generate(names, batch_size, steps=16, V=37):
    """Tokens of each named request; its logits depend on itself and the step alone."""
    rng = np.random.default_rng(9)
    table = {name: (rng.normal(size=(steps, V)) * 2).astype(np.float32) for name in REQUESTS}
    prompts = {name: [n + 1] * (n + 1) for n, name in enumerate(REQUESTS)}
    logits = np.zeros((steps, batch_size, V), np.float32)
    for row, name in enumerate(names):
        logits[:, row] = table[name]
    start = np.zeros(batch_size, np.int32)
    start[: len(names)] = [len(prompts[name]) for name in names]
    state, plan = make_sampling_state(
        [REQUESTS[name] for name in names], [prompts[name] for name in names], [0] * len(names), V, (2,), batch_size
    )

    tokens = np.asarray(run_steps(jnp.asarray(logits), state, jnp.asarray(start), plan=plan))
    return {name: tokens[:, row].tolist() for row, name in enumerate(names)}, plan


def test_a_request_draws_the_same_tokens_alone_and_in_any_batch():
    alone = {name: generate([name], 1)[0][name] for name in REQUESTS}
    assert len({tuple(tokens) for tokens in alone.values()}) == len(REQUESTS)
    for names, size in [
        (["plain", "warm"], 3),
        (["filtered", "plain", "greedy"], 3),
        (list(REQUESTS), 8),
        (list(reversed(REQUESTS)), 8),
    ]:
        together, plan = generate(names, size)
        assert together == {name: alone[name] for name in names}, plan
    assert plan == SamplingPlan("full", 32)


def test_positions_at_once_give_what_one_after_the_other_does():
    B, T, V = len(REQUESTS), 5, 600
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(B, T, V)) * 2, jnp.float32)
    positions = 3 + jnp.arange(T) + jnp.arange(B)[:, None]
    prompts = [[n + 1] * (n + 3) for n in range(B)]
    begin, plan = make_sampling_state(list(REQUESTS.values()), prompts, [0] * B, V, (2,))
    state, calls = begin, []
    for t in range(T):
        *call, state = sample(logits[:, t], state, positions[:, t], plan)
        calls.append(call)
    expected = jax.tree.map(lambda *x: np.stack(x, axis=1), *calls)

    drafted = expected[0].copy()
    tokens, logprobs, same = sample(logits, begin, positions, plan, drafted)
    jax.tree.map(np.testing.assert_array_equal, [tokens, logprobs], expected)
    jax.tree.map(np.testing.assert_array_equal, same, begin)
    jax.tree.map(np.testing.assert_array_equal, count(begin, tokens, jnp.full(B, T)), state)

    drafted[:, 2] = (drafted[:, 2] + 1) % V  # a wrong guess spoils what comes after it, and nothing before
    tokens, _, _ = sample(logits, begin, positions, plan, drafted)
    np.testing.assert_array_equal(tokens[:, :3], expected[0][:, :3])
    accepted = jnp.arange(B) % (T + 1)
    counts = count(begin, tokens, accepted).output_counts
    for row in range(B):
        np.testing.assert_array_equal(counts[row], np.bincount(tokens[row, : accepted[row]], minlength=V))


def test_noise_belongs_to_the_token_id_not_to_the_vocabulary():
    # A vocabulary padded with tokens that cannot be drawn gives the same draws, as sharding it needs.
    logits = np.random.default_rng(3).normal(size=24).astype(np.float32)
    for n in range(20):
        for params in (SamplingParams(seed=n), SamplingParams(seed=n, top_p=0.8)):
            padded = one_row([*logits, *[-INF] * 8], params, position=n)[0]
            assert one_row(logits, params, position=n)[0] == padded


def test_draws_do_not_depend_on_the_default_generator():
    tokens = [one_row(np.zeros(99), SamplingParams(seed=8), position=n)[0] for n in range(5)]
    jax.clear_caches()
    with jax.default_prng_impl("rbg"):
        assert tokens == [one_row(np.zeros(99), SamplingParams(seed=8), position=n)[0] for n in range(5)]


# What is compiled


def primitives(jaxpr, branches):
    """Names of what a program does, with or without what stands under a condition."""
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        inner = [value for value in equation.params.values() if hasattr(value, "jaxpr")]
        for value in [*inner, *(equation.params.get("branches", ()) if branches else ())]:
            yield from primitives(value.jaxpr, branches)


def test_a_batch_does_not_compute_what_no_row_asks_for():
    V = 32
    params = [SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1)] * 3
    state, plan = make_sampling_state(params, [[1]] * 3, [0] * 3, V, batch_size=4)
    assert plan == SamplingPlan("greedy")
    assert all(leaf.size <= 8 for leaf in jax.tree.leaves(state))

    def names(plan, state, branches):
        jaxpr = jax.make_jaxpr(lambda x, s, p: sample(x, s, p, plan))(jnp.zeros((4, V)), state, jnp.zeros(4, jnp.int32))
        return set(primitives(jaxpr.jaxpr, branches))

    greedy = names(plan, state, branches=True)
    assert "argmax" in greedy
    assert not greedy & {"sort", "top_k", "exp", "log", "cumsum", "div", "threefry2x32", "random_fold_in"}
    random = SamplingPlan("random")
    drawn = names(random, state, branches=False)
    assert "threefry2x32" in drawn
    assert not drawn & {"sort", "top_k", "cumsum"}
    assert {"top_k", "cumsum"} <= names(random, state, branches=True)
    full_state, full = make_sampling_state([SamplingParams(logprobs=3)], [[1]], [0], V, batch_size=4)
    unasked = {"threefry2x32", "top_k", "cumsum", "reduce_sum"}
    assert not names(full, full_state, branches=False) & unasked
    assert unasked <= names(full, full_state, branches=True)


def test_padding_rows_are_inert():
    params = SamplingParams(frequency_penalty=1.0, min_tokens=3, logit_bias={1: 2.0}, top_p=0.5, seed=1)
    state, plan = make_sampling_state([params], [[1, 2]], [0], 8, (7,), batch_size=4)
    assert isinstance(state, SamplingState)
    assert state.settings.temperature.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not np.asarray(state.bias)[1:].any()
    assert [row.tolist() for row in state.masked_until] == [[0] * 7 + [5], *[[0] * 8] * 3]
    tokens, _, _ = sample(jnp.zeros((4, 8)).at[1, 6].set(1.0), state, jnp.array([2, 0, 0, 0]), plan=plan)
    assert tokens.tolist()[1:] == [6, 0, 0]


def test_state_refuses_what_does_not_fit():
    one = [SamplingParams()]
    with pytest.raises(ValueError, match="1 sampling params, 2 prompts and 1 seeds for a batch_size of 1"):
        make_sampling_state(one, [[1], [2]], [0], 8)
    with pytest.raises(ValueError, match="for a batch_size of 1"):
        make_sampling_state(one * 2, [[1], [2]], [0, 0], 8, batch_size=1)


@pytest.mark.parametrize("top_k", [1, 5, 256, 257, 900])
def test_few_candidates_draw_what_the_whole_vocabulary_draws(top_k):
    # The same rows with a batch mate that needs the full sort, and without it.
    rng = np.random.default_rng(top_k)
    logits = jnp.asarray(np.round(rng.standard_normal((3, 2000)), 1), jnp.float32)  # many equals
    params = [SamplingParams(top_k=top_k, top_p=0.8, seed=n) for n in range(2)]
    drawn = []
    for mate in (SamplingParams(temperature=0.0), SamplingParams(top_p=0.9)):
        state, plan = make_sampling_state([*params, mate], [[]] * 3, [0] * 3, 2000)
        drawn.append([sample(logits, state, jnp.full(3, n), plan=plan)[0][:2].tolist() for n in range(20)])
    assert drawn[0] == drawn[1]


def test_the_best_of_chunks_are_the_best_of_all():
    logits = jnp.asarray(np.round(np.random.default_rng(0).standard_normal((2, 1, 3 * 4096)), 1), jnp.float32)
    logits = logits.at[0, 0, 40:].set(-INF)
    ids = jnp.broadcast_to(jnp.arange(logits.shape[-1]), logits.shape)
    for whole, merged in zip(jax.lax.top_k(logits, 64), scores._best_of_chunks(logits, ids, 64), strict=True):
        np.testing.assert_array_equal(whole, merged)
