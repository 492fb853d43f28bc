"""Every setting of JAX that a user may have on changes no number (another default device: multi_device/)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.decode.extend import NO_LOGITS

TOKENS, LENGTHS, NEXT = np.arange(22).reshape(2, 11) * 23, np.array([11, 6]), np.array([3, 5])
SETTINGS = {
    "64 bits": lambda: jax.enable_x64(True),
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
    "transfers told": lambda: jax.transfer_guard("log"),
    "other bits": lambda: jax.threefry_partitionable(False),
}
SAMPLING = rl.SamplingParams(max_tokens=4, seed=1, temperature=0.9, top_k=50, min_p=0.01, repetition_penalty=1.1)


def results(model):
    """Of forward, its gradient, prefill, decode, a row that is full, and generate."""
    inputs = (jax.device_put(array.astype(np.int32)) for array in (TOKENS, LENGTHS, NEXT))
    tokens, lengths, following = inputs
    cache = rl.init_cache(model.config, 2, 12, page_size=4)
    loss = jax.jit(jax.grad(lambda params: jnp.square(rl.forward(params, model.config, tokens)).mean()))
    out = {"forward": rl.forward(model.params, model.config, tokens), "gradient": loss(model.params)["final_norm"]}
    out["prefill"], cache = rl.prefill(model.params, model.config, tokens, lengths, cache)
    out["decode"], cache = rl.decode_step(model.params, model.config, following, cache)
    out["full"], cache = rl.decode_step(model.params, model.config, following, cache)
    prompts, greedy = [[1, 2, 3], [4, 5]], rl.SamplingParams(max_tokens=4, temperature=0.0, logprobs=2)
    drawn = rl.generate(model, prompts, [SAMPLING, greedy])
    logprobs = [token.logprob for token in drawn[1].logprobs]
    return jax.device_get(out) | {"tokens": [output.tokens for output in drawn], "logprobs": logprobs}


@pytest.fixture(scope="module")
def expected(model):
    return results(model)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_jax_change_nothing(model, expected, setting):
    with SETTINGS[setting]():
        found = results(model)
    assert (found["full"][0] == NO_LOGITS).all()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.asarray(found[name]).dtype == np.asarray(values).dtype
