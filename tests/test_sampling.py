"""Masks, penalties, filters and extremes of `sample`, against the reference and by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ridgeline.decode.sampling.draw import sample
from ridgeline.decode.sampling.layout import SamplingPlan
from ridgeline.decode.sampling.params import SamplingParams
from ridgeline.decode.sampling.scores import filtered_logits
from ridgeline.decode.sampling.state import make_sampling_state
from sampling_reference import INF, NAN, kept, one_row, random_params, reference_noise, reference_scores

# The whole pipeline against the reference


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_pipeline_equals_the_reference_over_random_parameters(scale):
    B, V, steps, eos = 96, 53, 12, (7, 11)
    rng = np.random.default_rng(int(scale))
    params = [random_params(rng, V) for _ in range(B)]
    prompts = [rng.integers(0, V, rng.integers(1, 9)).tolist() for _ in range(B)]
    logits = (rng.normal(size=(steps, B, V)) * scale).astype(np.float32)
    state, plan = make_sampling_state(params, prompts, [0] * B, V, eos)
    assert plan == SamplingPlan("full", 32)

    outputs, close = [[] for _ in range(B)], 0
    lengths = np.array([len(p) for p in prompts])
    for step in range(steps):
        positions = jnp.asarray(lengths + step)
        tokens, logprobs, state = sample(jnp.asarray(logits[step]), state, positions, plan=plan)
        assert not logprobs.top.any()  # nobody asked
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
    state, _ = make_sampling_state(params, None, [0] * B, V)
    found = np.asarray(jax.jit(filtered_logits)(jnp.asarray(logits)[:, None], state.settings))[:, 0]
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
def test_a_broken_row_gives_no_token_and_leaves_the_others_alone(bad, everywhere):
    V = 16
    logits = np.random.default_rng(0).normal(size=(3, V)).astype(np.float32)
    for params in (SamplingParams(temperature=0, logprobs=2), SamplingParams(top_p=0.8, logprobs=2, min_p=0.01)):
        state, plan = make_sampling_state([params] * 3, [[1]] * 3, [1, 2, 3], V)
        positions = jnp.array([1, 1, 1])
        whole, reported, _ = sample(jnp.asarray(logits), state, positions, plan=plan)
        broken = logits.copy()
        broken[1, slice(None) if everywhere else 5] = bad
        tokens, broken_reported, _ = sample(jnp.asarray(broken), state, positions, plan=plan)
        assert tokens.tolist() == [whole[0], -1, whole[2]]
        assert np.isnan(broken_reported.chosen[1])
        np.testing.assert_array_equal(broken_reported.chosen[::2], reported.chosen[::2])
        np.testing.assert_array_equal(broken_reported.top[::2], reported.top[::2])


def test_a_nan_row_is_not_counted_against_its_neighbors():
    params = SamplingParams(frequency_penalty=1.0, temperature=0)
    state, plan = make_sampling_state([params] * 2, [[1]] * 2, [0, 0], 4)
    logits = jnp.array([[NAN] * 4, [0.0, 1.0, 3.0, 2.0]])
    _, _, state = sample(logits, state, jnp.array([1, 1]), plan=plan)
    assert state.output_counts.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0]]


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


@pytest.mark.parametrize("temperature", [0.0, 1.0, 1e300])
def test_suppressed_tokens_are_never_drawn(temperature):
    """However much likelier they are, and whatever is added or taken off."""
    logits, prompt = [1e30, 3e38, -300.0, -310.0], [0]
    params = SamplingParams(temperature=temperature, suppress_tokens=[0], begin_suppress_tokens=[1])
    more = {"logit_bias": {0: 100.0}, "repetition_penalty": 0.1, "frequency_penalty": -2.0, "presence_penalty": -2.0}
    for asked in (params, dataclasses.replace(params, **more), dataclasses.replace(params, top_p=0.5, min_p=0.1)):
        assert {one_row(logits, asked, prompt=prompt, seed=seed)[0] for seed in range(9)} <= {2, 3}
        later = {one_row(logits, asked, prompt=prompt, seed=seed, output=[0, 2])[0] for seed in range(9)}
        assert later <= {1, 2, 3}
        assert 1 in later
    token, reported = one_row(logits, dataclasses.replace(params, logprobs=2), prompt=prompt)
    assert token in (2, 3)
    assert reported.top_ids[:2].tolist() == [1, 0]  # of the model itself
    assert not np.isnan(reported.top).any()


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


def test_adjust_comes_before_everything_else():
    def adjusted(logits, context):
        assert (logits.shape, context.seeds.shape) == ((2, 4), (2, 2))
        return (
            logits.at[:, 3]
            .add(20.0)
            .at[:, 0]
            .add(jnp.where(context.previous == context.seeds[:, 1], 10.0, context.positions - 3.0))
        )

    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[3], logprobs=2, seed=2**32 + 2)
    state, plan = make_sampling_state([params], [[1]], [0], 4)
    logits, positions = jnp.array([[[1.0, 0.0, 3.0, 2.0]] * 2]), jnp.array([[1, 2]])
    previous = jnp.array([[1, 2]])
    tokens, reported, _ = sample(logits, state, positions, plan, None, adjusted, previous)
    assert tokens.tolist() == [[2, 0]]  # 3 is not allowed yet
    assert reported.top_ids[0, :, 0].tolist() == [2, 2]  # of the model itself
    tokens, _, _ = sample(logits, state, positions + 2, plan, None, adjusted, previous)
    assert tokens.tolist() == [[3, 3]]
    with pytest.raises(ValueError, match="pass them as previous"):
        sample(logits, state, positions, plan, None, adjusted)
