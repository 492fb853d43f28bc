"""Sampling of one row in float64 NumPy, written from the definitions: it shares no code with the package."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ridgeline.decode.sampling.draw import sample
from ridgeline.decode.sampling.params import SamplingParams
from ridgeline.decode.sampling.scores import filtered_logits
from ridgeline.decode.sampling.state import count, make_sampling_state

INF, NAN = math.inf, math.nan


def reference_scores(logits, params, prompt, output, eos=()):
    """Logits of the greedy choice, then those of the draw: -inf for every token that cannot be drawn."""
    x = np.array(logits, np.float64)
    if len(output) < params.min_tokens:
        for token in (*eos, *params.stop_token_ids):
            x[token] = -INF
    for token in (*params.suppress_tokens, *(() if output else params.begin_suppress_tokens)):
        x[token] = -INF
    for token in set(range(len(x))).difference(params.allowed_token_ids or range(len(x))):
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
    if output:
        state = count(state, jnp.array([output]), jnp.array([len(output)]))
    position = len(prompt) + len(output) if position is None else position
    tokens, logprobs, _ = sample(logits, state, jnp.array([position]), plan=plan)
    return int(tokens[0]), jax.tree.map(lambda a: np.asarray(a)[0], logprobs)


def kept(logits, **params):
    """Ids that the filters leave in one row, whose temperature is 1."""
    logits = jnp.asarray([[logits]], jnp.float32)
    state, _ = make_sampling_state([SamplingParams(**params)], [[]], [0], logits.shape[-1])
    return np.flatnonzero(np.asarray(jax.jit(filtered_logits)(logits, state.settings))[0, 0] > -INF).tolist()


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
        suppress_tokens=maybe(None, lambda: rng.integers(0, vocab_size, 3).tolist()),
        begin_suppress_tokens=maybe(None, lambda: rng.integers(0, vocab_size, 3).tolist()),
        allowed_token_ids=maybe(None, lambda: rng.permutation(vocab_size)[: vocab_size // 2].tolist()),
        stop_token_ids=maybe(None, lambda: rng.integers(0, vocab_size, 3).tolist()),
        min_tokens=maybe(0, lambda: int(rng.integers(0, 8))),
        seed=int(rng.integers(0, 2**32)),
    )
