import dataclasses
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from ridgeline.decode.sampling import (
    SampleLogprobs,
    SamplingPlan,
    SamplingState,
    _gumbel,
    filtered_logits,
    make_sampling_state,
    sample,
)
from ridgeline.decode.sampling_params import SamplingParams

INF, NAN = math.inf, math.nan
jitted_sample = jax.jit(sample, static_argnames="plan")


# The reference: one row, float64, written from the definitions. It shares no code with the package.


def reference_scores(logits, params, prompt, output, eos=()):
    """Logits of the greedy choice, then those of the draw: -inf for every token that cannot be drawn."""
    x = np.array(logits, np.float64)
    if len(output) < params.min_tokens:
        for token in (*eos, *params.stop_token_ids):
            x[token] = -INF
    for token, bias in (params.logit_bias or {}).items():
        x[token] += bias
    for token in range(len(x)):
        if token in prompt or token in output:
            x[token] = x[token] / params.repetition_penalty if x[token] > 0 else x[token] * params.repetition_penalty
        x[token] -= params.frequency_penalty * list(output).count(token)
        x[token] -= params.presence_penalty * (token in output)
    greedy = x.copy()
    if params.temperature == 0:
        return greedy, None, 1.0
    x = (x - x.max()) / params.temperature
    margin = INF  # how far the closest call of a threshold was, which float32 may decide otherwise
    weights = np.exp(x)
    ratio = weights / weights.max()
    if params.min_p > 0:
        margin = min(margin, np.abs(ratio - params.min_p).min() / params.min_p)
        x[ratio < params.min_p] = -INF
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    if params.top_k > 0:
        x[order[params.top_k :]] = -INF
    if params.top_p < 1:
        probs = np.exp(x) / np.exp(x).sum()
        total = 0.0
        for token in order:
            margin = min(margin, abs(total - params.top_p))
            if total >= params.top_p:
                x[token] = -INF
            total += probs[token]
    return greedy, x, margin


def reference_noise(seed, position, vocab_size):
    key = jax.random.fold_in(jax.random.key(seed), position)
    bits = np.asarray(jax.random.bits(key, (vocab_size,), jnp.uint32)).astype(np.float64)
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def one_row(logits, params, *, prompt=(), seed=0, position=None, eos=(), output=()):
    """The token and log probabilities of one request alone, after `output`."""
    logits = jnp.asarray([logits], jnp.float32)
    state, plan = make_sampling_state([params], [list(prompt)], [seed], logits.shape[1], eos)
    if plan.penalties:
        counts = np.bincount(np.array(output, np.int64), minlength=logits.shape[1]).astype(np.int32)
        state = state.replace(output_counts=jnp.asarray(counts[None]))
    position = len(prompt) + len(output) if position is None else position
    tokens, logprobs, _ = jitted_sample(logits, state, jnp.array([position]), plan=plan)
    return int(tokens[0]), jax.tree.map(lambda a: np.asarray(a)[0], logprobs)


def kept(logits, **params):
    """Ids that the filters leave in one row, whose temperature is 1."""
    logits = jnp.asarray([logits], jnp.float32)
    state, _ = make_sampling_state([SamplingParams(**params)], [[]], [0], logits.shape[1])
    return np.flatnonzero(np.asarray(jax.jit(filtered_logits)(logits, state))[0] > -INF).tolist()


def random_params(rng, vocab_size):
    def maybe(default, draw):
        return draw() if rng.random() < 0.5 else default

    return SamplingParams(
        temperature=0.0 if rng.random() < 0.15 else maybe(1.0, lambda: rng.uniform(0.05, 3)),
        top_k=maybe(0, lambda: int(rng.integers(-1, vocab_size + 20))),
        top_p=maybe(1.0, lambda: rng.uniform(0.01, 1)),
        min_p=maybe(0.0, lambda: rng.uniform(0.001, 0.5)),
        repetition_penalty=maybe(1.0, lambda: rng.uniform(0.5, 2)),
        presence_penalty=maybe(0.0, lambda: rng.uniform(-2, 2)),
        frequency_penalty=maybe(0.0, lambda: rng.uniform(-2, 2)),
        logit_bias=maybe(None, lambda: {int(t): rng.uniform(-9, 9) for t in rng.integers(0, vocab_size, 5)}),
        stop_token_ids=maybe(None, lambda: rng.integers(0, vocab_size, 3).tolist()),
        min_tokens=maybe(0, lambda: int(rng.integers(0, 8))),
        seed=int(rng.integers(0, 2**32)),
    )


# The whole pipeline against the reference


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_pipeline_equals_the_reference_over_random_parameters(scale):
    B, V, steps, eos = 96, 53, 12, (7, 11)
    rng = np.random.default_rng(int(scale))
    params = [random_params(rng, V) for _ in range(B)]
    prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(B)]
    logits = (rng.normal(size=(steps, B, V)) * scale).astype(np.float32)
    state, plan = make_sampling_state(params, prompts, [0] * B, V, eos)
    assert plan == SamplingPlan(True, True, True, True, True, None)

    outputs, close = [[] for _ in range(B)], 0
    lengths = np.array([len(p) for p in prompts])
    for step in range(steps):
        positions = jnp.asarray(lengths + step)
        tokens, logprobs, state = jitted_sample(jnp.asarray(logits[step]), state, positions, plan=plan)
        assert logprobs is None
        for row, (p, token) in enumerate(zip(params, np.asarray(tokens).tolist(), strict=True)):
            greedy, scores, margin = reference_scores(logits[step, row], p, prompts[row], outputs[row], eos)
            scores = greedy if p.temperature == 0 else scores + reference_noise(p.seed, lengths[row] + step, V)
            best, second = np.sort(scores)[[-1, -2]]
            if margin < 1e-5 or best - second < 1e-5:
                close += 1
            else:
                assert token == np.argmax(scores), (step, row, p)
            outputs[row].append(token)
    assert close < 0.01 * B * steps


def test_filters_keep_what_the_reference_keeps():
    B, V = 256, 67
    rng = np.random.default_rng(0)
    base = SamplingParams(temperature=1.0)
    params = [
        dataclasses.replace(base, **{n: getattr(random_params(rng, V), n) for n in ("top_k", "top_p", "min_p")})
        for _ in range(B)
    ]
    logits = (rng.normal(size=(B, V)) * rng.choice([0.3, 2, 8], (B, 1))).astype(np.float32)
    logits[rng.random((B, V)) < 0.1] = -INF
    state, _ = make_sampling_state(params, [[]] * B, [0] * B, V)
    found = np.asarray(jax.jit(filtered_logits)(jnp.asarray(logits), state))
    close = 0
    for row, p in enumerate(params):
        _, expected, margin = reference_scores(logits[row], p, (), ())
        if margin < 1e-5:
            close += 1
            continue
        np.testing.assert_array_equal(found[row] > -INF, expected > -INF, err_msg=str(p))
        np.testing.assert_array_equal(found[row][found[row] > -INF], logits[row][found[row] > -INF])
    assert close < 0.02 * B


# Filters by hand


def test_filters_by_hand():
    logits = np.log([0.125, 0.5, 0.25, 0.0625, 0.0625])
    assert kept(logits) == [0, 1, 2, 3, 4]
    assert kept(logits, top_k=2) == [1, 2]
    assert kept(logits, top_k=-1) == kept(logits, top_k=5) == kept(logits, top_k=10**12) == [0, 1, 2, 3, 4]
    assert kept(logits, top_p=0.5) == [1]
    assert kept(logits, top_p=0.51) == [1, 2]
    assert kept(logits, top_p=0.8) == [0, 1, 2]
    assert kept(logits, min_p=0.2) == [0, 1, 2]
    assert kept(logits, min_p=1.0) == [1]
    # On 1, 2 and 0, which top-k leaves, the probabilities are 4/7, 2/7 and 1/7.
    assert kept(logits, top_k=3, top_p=0.57) == [1]
    assert kept(logits, top_k=3, top_p=0.6) == kept(logits, top_k=3, top_p=0.85) == [1, 2]
    # And so they are on those that min-p leaves.
    assert kept(logits, min_p=0.2, top_p=0.57) == [1]


def test_equal_logits_are_kept_lowest_id_first():
    assert kept([1.0, 3.0, 2.0, 3.0, 3.0], top_k=2) == [1, 3]
    assert kept([0.0] * 8, top_k=3) == [0, 1, 2]
    assert kept([0.0] * 8, top_p=0.5) == [0, 1, 2, 3]
    assert kept([0.0, -0.0, 0.0, -0.0], top_k=3) == [0, 1, 2]
    assert kept([0.0] * 8, min_p=1.0) == list(range(8))


@pytest.mark.parametrize("off", [{}, {"top_k": 1}, {"top_p": 1e-50}, {"min_p": 1.0}])
def test_one_token_at_least_is_kept(off):
    logits = [-INF, 2.0, -1e30, 1.0]
    assert kept(logits, **off) == ([1] if off else [1, 2, 3])
    token, _ = one_row(logits, SamplingParams(**off))
    assert token in (1, 3)


def test_top_p_one_keeps_tokens_beyond_the_precision_of_the_sum():
    logits = np.zeros(4096)
    logits[-1] = -60
    assert len(kept(logits, top_k=5000, top_p=1.0)) == 4096
    assert len(kept(logits, top_k=4095, top_p=1.0)) == 4095


# Extremes


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        ([0.0, 1e30, -1e30, 5.0], 1),
        ([-1e30, -1e30, -2e30, -INF], 0),
        ([-INF, -INF, -3e38, -INF], 2),
        ([-3e38, 3e38, -INF, 0.0], 1),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1e-5, 1e-3, 1.0])
def test_extreme_logits(logits, expected, temperature):
    for position in range(3):
        params = SamplingParams(temperature=temperature, top_p=0.9)
        token, _ = one_row(logits, params, position=position)
        assert token == expected or (expected == 0 and token == 1 and temperature > 0)  # equal logits


def test_extreme_parameters():
    logits = [3.0, 1.0, -INF, 2.0]
    assert one_row(logits, SamplingParams(temperature=1e-5))[0] == 0
    assert one_row(logits, SamplingParams(temperature=9e-6))[0] == 0
    seen = {one_row(logits, SamplingParams(temperature=1e300), position=n)[0] for n in range(40)}
    assert seen == {0, 1, 3}
    assert one_row(logits, SamplingParams(temperature=0, repetition_penalty=1e300), prompt=[0, 1])[0] == 3
    assert one_row(logits, SamplingParams(temperature=1, repetition_penalty=1e-300), prompt=[1])[0] == 1
    overflow = SamplingParams(repetition_penalty=1e-300, top_p=0.5)
    assert one_row([1.0, 2.0, 1e20, 3.0], overflow, prompt=[2])[0] == 2
    assert one_row(logits, SamplingParams(temperature=0, min_tokens=2**40, max_tokens=None), eos=[0])[0] == 3


def test_a_row_with_every_token_masked_gives_the_lowest_id():
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, min_tokens=1, stop_token_ids=[0, 1, 2], top_p=0.5)
        assert one_row([1.0, 2.0, 3.0], params)[0] == 0


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("everywhere", [True, False])
def test_a_broken_row_gives_token_0_and_leaves_the_others_alone(bad, everywhere):
    V = 16
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    for params in (SamplingParams(temperature=0, logprobs=2), SamplingParams(top_p=0.8, logprobs=2, min_p=0.01)):
        state, plan = make_sampling_state([params] * 3, [[1]] * 3, [1, 2, 3], V)
        positions = jnp.array([1, 1, 1])
        whole, reported, _ = jitted_sample(jnp.asarray(logits), state, positions, plan=plan)
        broken = logits.copy()
        broken[1, slice(None) if everywhere else 5] = bad
        tokens, broken_reported, _ = jitted_sample(jnp.asarray(broken), state, positions, plan=plan)
        assert tokens.tolist() == [whole[0], 0, whole[2]]
        assert np.isnan(broken_reported.chosen[1])
        np.testing.assert_array_equal(broken_reported.chosen[::2], reported.chosen[::2])
        np.testing.assert_array_equal(broken_reported.top[::2], reported.top[::2])


def test_a_nan_row_is_not_counted_against_its_neighbours():
    params = SamplingParams(frequency_penalty=1.0, temperature=0)
    state, plan = make_sampling_state([params] * 2, [[1]] * 2, [0, 0], 4)
    logits = jnp.array([[NAN] * 4, [0.0, 1.0, 3.0, 2.0]])
    _, _, state = jitted_sample(logits, state, jnp.array([1, 1]), plan=plan)
    assert state.output_counts.tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


# Greedy, penalties, biases, min_tokens


def test_greedy_takes_the_lowest_id_of_equals():
    assert one_row([1.0, 4.0, 4.0, 4.0], SamplingParams(temperature=0))[0] == 1
    assert one_row([-INF] * 4, SamplingParams(temperature=0))[0] == 0


def test_penalties_by_hand():
    greedy = SamplingParams(temperature=0)

    def token(logits, output=(), prompt=(), **params):
        return one_row(logits, dataclasses.replace(greedy, **params), prompt=prompt, output=output)[0]

    # Repetition divides what is positive and multiplies what is negative, for tokens of the prompt and the output.
    assert token([4.0, 3.0, 1.0], prompt=[0], repetition_penalty=1.5) == 1  # 4 / 1.5 = 2.67
    assert token([4.0, 3.0, 1.0], prompt=[0], repetition_penalty=1.3) == 0  # 4 / 1.3 = 3.08
    assert token([4.0, 3.0, 1.0], output=[0], repetition_penalty=1.5) == 1
    assert token([-1.0, -1.9, -3.0], prompt=[0], repetition_penalty=2.0) == 1  # -1 * 2
    assert token([-1.0, -1.9, -3.0], prompt=[0, 0, 0], repetition_penalty=1.8) == 0  # once, however often it stands
    assert token([1.0, 2.0, 0.0], prompt=[0], repetition_penalty=0.4) == 0  # 1 / 0.4 = 2.5: below 1 encourages
    # Presence and frequency look at the output alone.
    assert token([4.0, 3.0, 1.0], prompt=[0], presence_penalty=2.0) == 0
    assert token([4.0, 3.0, 1.0], prompt=[0], frequency_penalty=2.0) == 0
    assert token([4.0, 3.0, 1.0], output=[0], presence_penalty=1.1) == 1
    assert token([4.0, 3.0, 1.0], output=[0, 0, 0], presence_penalty=0.9) == 0  # once, however often it stands
    assert token([4.0, 3.0, 1.0], output=[0, 0], frequency_penalty=0.6) == 1  # 4 - 2 * 0.6 = 2.8
    assert token([4.0, 3.0, 1.0], output=[0, 0], frequency_penalty=0.4) == 0
    assert token([4.0, 3.0, 1.0], output=[2, 2], frequency_penalty=-2.0) == 2  # 1 + 4
    # Repetition first: 4 / 2 - 0.5 - 2 * 0.25 = 1.
    assert token([4.0, 0.9, -9.0], (0, 0), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25) == 0
    assert token([4.0, 1.1, -9.0], (0, 0), repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25) == 1


def test_bias_comes_before_penalties_and_does_not_touch_logprobs():
    params = SamplingParams(temperature=0, logit_bias={2: 100.0, 0: -100.0}, logprobs=3)
    token, reported = one_row([5.0, 4.0, 1.0], params)
    assert token == 2
    assert reported.rank == 3
    np.testing.assert_allclose(reported.chosen, 1 - np.log(np.exp([5, 4, 1]).sum()), rtol=1e-6)
    # -1 + 5 = 4 is positive when the penalty comes, so it is divided: 2. Multiplied first it would be -2 + 5 = 3.
    params = SamplingParams(temperature=0, logit_bias={0: 5.0}, repetition_penalty=2.0)
    assert one_row([-1.0, 2.5], params, prompt=[0])[0] == 1


def test_min_tokens_keeps_the_row_from_ending():
    logits, prompt, eos = [9.0, 8.0, 7.0, 6.0], [1, 1], [0]
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[1])
    tokens = [one_row(logits, params, prompt=prompt, eos=eos, position=2 + n)[0] for n in range(4)]
    assert tokens == [2, 2, 0, 0]
    # As in vLLM, ignore_eos is about ending: min_tokens masks the token all the same.
    assert one_row(logits, dataclasses.replace(params, ignore_eos=True), prompt=prompt, eos=eos)[0] == 2
    # Even a bias cannot lift a masked token, and an end token the model lacks does no harm.
    assert one_row(logits, dataclasses.replace(params, logit_bias={0: 100.0}), prompt=prompt, eos=[0, 99])[0] == 2


def test_counts_follow_a_scan():
    V, steps = 11, 9
    params = [SamplingParams(frequency_penalty=1.5, presence_penalty=0.3, seed=3), SamplingParams(temperature=0)]
    state, plan = make_sampling_state(params, [[1], [2, 3]], [0, 0], V)
    logits = jnp.asarray(np.random.default_rng(1).normal(size=(2, V)), jnp.float32)

    @jax.jit
    def run(state):
        def step(carry, n):
            tokens, _, carry = sample(logits, carry, jnp.array([1, 2]) + n, plan)
            return carry, tokens

        return jax.lax.scan(step, state, jnp.arange(steps))

    state, tokens = run(state)
    for row in range(2):
        np.testing.assert_array_equal(state.output_counts[row], np.bincount(tokens[:, row], minlength=V))
    for n in range(steps):
        _, scores, _ = reference_scores(logits[0], params[0], [1], np.asarray(tokens[:n, 0]).tolist())
        assert int(tokens[n, 0]) == np.argmax(scores + reference_noise(3, 1 + n, V))
    assert len(set(np.asarray(tokens[:, 1]).tolist())) == 1


# Log probabilities


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_logprobs_are_the_models_own(temperature):
    B, V, n = 32, 41, 5
    rng = np.random.default_rng(2)
    logits = (rng.normal(size=(B, V)) * 3).astype(np.float32)
    logits[:, 17] = logits[:, 3]
    params = SamplingParams(temperature=temperature, top_k=30, logprobs=n, logit_bias={17: 6.0}, repetition_penalty=1.3)
    state, plan = make_sampling_state([params] * B, [[1, 2]] * B, range(B), V)
    tokens, reported, _ = jitted_sample(jnp.asarray(logits), state, jnp.full(B, 2), plan=plan)
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
    assert none.top.shape == none.top_ids.shape == (0,)
    assert none.chosen < 0

    def width(*asked, vocab_size=1000):
        params = [SamplingParams(logprobs=n) for n in asked]
        return make_sampling_state(params, [[]] * len(asked), [0] * len(asked), vocab_size)[1].logprobs

    assert [width(n) for n in (None, 0, 1, 8, 9, 33, 1000)] == [None, 0, 8, 8, 32, 128, 1000]
    assert (width(None, 3, 0), width(3, 20, None), width(3, vocab_size=5)) == (8, 32, 5)


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
    noise = np.asarray(_gumbel(state, jnp.array([0]), V))[0]
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
    runs = [
        np.asarray(jitted_sample(logits, state, jnp.arange(8).at[5].set(7).at[6].set(7) + n, plan=plan)[0])
        for n in range(12)
    ]
    columns = {tuple(int(run[row]) for run in runs) for row in range(8)}
    assert len(columns) == 6  # rows 5, 6 and 7 have one seed and one position


def test_params_seed_comes_before_the_given_seeds():
    given = make_sampling_state([SamplingParams(seed=5), SamplingParams()], [[], []], [1, 6], 4)[0]
    np.testing.assert_array_equal(given.seeds, [[0, 5], [0, 6]])


# Independence of the batch


REQUESTS = {
    "plain": SamplingParams(seed=1),
    "warm": SamplingParams(temperature=0.7, seed=2),
    "filtered": SamplingParams(top_k=20, top_p=0.9, min_p=0.02, seed=3),
    "penalised": SamplingParams(repetition_penalty=1.4, frequency_penalty=0.5, presence_penalty=-0.5, seed=4),
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
    assert plan == SamplingPlan(True, True, True, True, True, 8)


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


def primitives(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from primitives(value.jaxpr)


def test_a_greedy_batch_compiles_to_an_argmax():
    V = 32
    params = [SamplingParams(temperature=0, top_k=3, top_p=0.5, min_p=0.1)] * 3
    state, plan = make_sampling_state(params, [[1]] * 3, [0] * 3, V, batch_size=4)
    assert plan == SamplingPlan()
    assert all(leaf.size <= 8 for leaf in jax.tree.leaves(state))

    def names(plan, state):
        jaxpr = jax.make_jaxpr(lambda x, s, p: sample(x, s, p, plan))(jnp.zeros((4, V)), state, jnp.zeros(4, jnp.int32))
        return set(primitives(jaxpr.jaxpr))

    greedy = names(plan, state)
    assert "argmax" in greedy
    assert not greedy & {"sort", "top_k", "exp", "log", "cumsum", "div", "threefry2x32", "random_bits", "iota"}
    drawn = names(SamplingPlan(random=True), state)
    assert "random_bits" in drawn
    assert not drawn & {"sort", "top_k", "cumsum"}
    assert "sort" in names(SamplingPlan(random=True, filters=True), state)


def test_padding_rows_are_inert():
    params = SamplingParams(frequency_penalty=1.0, min_tokens=3, logit_bias={1: 2.0}, top_p=0.5, seed=1)
    state, plan = make_sampling_state([params], [[1, 2]], [0], 8, (7,), batch_size=4)
    assert isinstance(state, SamplingState)
    assert state.temperature.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not np.asarray(state.bias)[1:].any()
    assert not np.asarray(state.stop_mask)[1:].any()
    assert state.min_length.tolist() == [5, 0, 0, 0]
    tokens, _, _ = jitted_sample(jnp.zeros((4, 8)).at[1, 6].set(1.0), state, jnp.array([2, 0, 0, 0]), plan=plan)
    assert tokens.tolist()[1:] == [6, 0, 0]


def test_state_refuses_what_does_not_fit():
    one = [SamplingParams()]
    with pytest.raises(ValueError, match="1 sampling params, 2 prompts and 1 seeds for a batch of 1"):
        make_sampling_state(one, [[1], [2]], [0], 8)
    with pytest.raises(ValueError, match="for a batch of 1"):
        make_sampling_state(one * 2, [[1], [2]], [0, 0], 8, batch_size=1)


# SamplingParams


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (ValueError, {"temperature": NAN}, "temperature is nan; it must be finite and at least 0"),
        (ValueError, {"temperature": -0.1}, "temperature is -0.1"),
        (ValueError, {"temperature": INF}, "temperature is inf"),
        (ValueError, {"temperature": 10**400}, "temperature is 1000"),
        (TypeError, {"temperature": "0.5"}, "temperature is '0.5', a str; it must be a number"),
        (TypeError, {"temperature": True}, "temperature is True, a bool"),
        (TypeError, {"temperature": None}, "temperature is None"),
        (ValueError, {"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        (ValueError, {"top_p": 1.01}, "top_p is 1.01"),
        (ValueError, {"top_p": NAN}, "top_p is nan"),
        (ValueError, {"min_p": -0.01}, r"min_p is -0.01; it must be in \[0, 1\]"),
        (ValueError, {"min_p": 1.01}, "min_p is 1.01"),
        (ValueError, {"top_k": -2}, "top_k is -2; it must be at least 1, or 0"),
        (TypeError, {"top_k": 5.0}, "top_k is 5.0, a float; it must be an integer"),
        (TypeError, {"top_k": True}, "top_k is True, a bool"),
        (TypeError, {"top_k": None}, "top_k is None"),
        (ValueError, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be finite and above 0"),
        (ValueError, {"repetition_penalty": INF}, "repetition_penalty is inf"),
        (ValueError, {"presence_penalty": 2.1}, r"presence_penalty is 2.1; it must be in \[-2, 2\]"),
        (ValueError, {"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
        (ValueError, {"frequency_penalty": NAN}, "frequency_penalty is nan"),
        (ValueError, {"max_tokens": 0}, "max_tokens is 0; it must be at least 1, or None"),
        (ValueError, {"max_tokens": -3}, "max_tokens is -3"),
        (TypeError, {"max_tokens": 16.0}, "max_tokens is 16.0, a float"),
        (TypeError, {"max_tokens": "16"}, "max_tokens is '16', a str"),
        (ValueError, {"min_tokens": -1}, "min_tokens is -1; it must be at least 0"),
        (ValueError, {"min_tokens": 17}, "min_tokens is 17, above max_tokens 16"),
        (ValueError, {"logprobs": -1}, "logprobs is -1; it must be at least 0"),
        (TypeError, {"logprobs": True}, "logprobs is True"),
        (ValueError, {"seed": -1}, r"seed is -1; it must be in \[0, 2\*\*64\)"),
        (ValueError, {"seed": 2**64}, "seed is 18446744073709551616"),
        (TypeError, {"seed": 1.5}, "seed is 1.5"),
        (ValueError, {"logit_bias": {3: NAN}}, r"logit_bias of token 3 is nan; it must be in \[-100, 100\]"),
        (ValueError, {"logit_bias": {3: 100.5}}, "logit_bias of token 3 is 100.5"),
        (ValueError, {"logit_bias": {-3: 1.0}}, "a token id of logit_bias is -3"),
        (TypeError, {"logit_bias": {"3": 1.0}}, "a token id of logit_bias is '3', a str"),
        (TypeError, {"logit_bias": {3: "1"}}, "logit_bias of token 3 is '1'"),
        (TypeError, {"logit_bias": [(3, 1.0)]}, "logit_bias is .*; it must be a mapping"),
        (ValueError, {"stop": ""}, "stop is ''; an empty string"),
        (ValueError, {"stop": ["a", ""]}, r"stop is \['a', ''\]; an empty string"),
        (TypeError, {"stop": 5}, "stop is 5; it must be a string"),
        (TypeError, {"stop": [b"a"]}, r"stop is \[b'a'\]; it must be a string"),
        (ValueError, {"stop_token_ids": [1, -1]}, "a token id of stop_token_ids is -1"),
        (TypeError, {"stop_token_ids": [1.0]}, "a token id of stop_token_ids is 1.0, a float"),
        (TypeError, {"stop_token_ids": [False]}, "a token id of stop_token_ids is False, a bool"),
        (TypeError, {"stop_token_ids": 5}, "stop_token_ids is 5; it must be a sequence"),
        (TypeError, {"stop_token_ids": "12"}, "stop_token_ids is '12'; it must be a sequence"),
        (TypeError, {"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
        (TypeError, {"skip_special_tokens": "no"}, "skip_special_tokens is 'no'"),
        (TypeError, {"include_stop_str_in_output": None}, "include_stop_str_in_output is None"),
    ],
    ids=str,
)
def test_bad_params_are_refused_at_construction(error, fields, message):
    with pytest.raises(error, match=f"^{message}"):
        SamplingParams(**fields)


def test_good_params_at_the_edges():
    params = SamplingParams(
        max_tokens=None,
        temperature=0,
        top_k=np.int64(3),
        top_p=np.float32(0.5),
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={np.int32(1): -100},
        seed=2**64 - 1,
        stop="a",
        stop_token_ids=(5, 5, 6),
        min_tokens=99,
    )
    assert (params.temperature, params.top_k, params.top_p, params.logit_bias) == (0.0, 3, 0.5, {1: -100.0})
    assert type(params.top_k) is int
    assert type(params.temperature) is type(params.top_p) is float
    assert (params.stop, params.stop_token_ids, SamplingParams().stop) == (("a",), (5, 6), ())
    assert params.greedy
    assert not SamplingParams(temperature=1e-5).greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1
    for same in (dataclasses.replace(params), pickle.loads(pickle.dumps(params))):
        assert same == params
        assert hash(same) == hash(params)
    assert params != dataclasses.replace(params, logit_bias={1: -99})


def test_params_against_a_vocabulary():
    params = SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9], logprobs=10)
    params.validate(10)
    with pytest.raises(ValueError, match=r"stop_token_ids has token ids \[9\]; the vocabulary has 9 tokens"):
        params.validate(9)
    with pytest.raises(ValueError, match=r"logit_bias has token ids \[9\].*ids must be in \[0, 9\)"):
        dataclasses.replace(params, stop_token_ids=None).validate(9)
    with pytest.raises(ValueError, match="logprobs is 10; the vocabulary has 9 tokens"):
        SamplingParams(logprobs=10).validate(9)
