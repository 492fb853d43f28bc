"""Intervening while it generates: what seams and `adjust` do to cached tokens, whatever the batch."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.decode.engine import slots
from tiny import tiny_config, tiny_model

rng = np.random.default_rng(5)
PROMPTS = [rng.integers(0, 509, n).tolist() for n in (5, 1, 40, 17, 70)]
GREEDY = rl.SamplingParams(temperature=0.0, max_tokens=12)
DIRECTION = rng.normal(size=48).astype(np.float32)


@pytest.fixture(scope="module")
def model():
    """Of equal layers too, which are traced once where nothing looks into them."""
    rope = rl.RopeConfig(rotary_dim=20)
    return tiny_model(tiny_config(layers=(rl.LayerConfig(rope, window=9), *[rl.LayerConfig(rope)] * 2)))


def steered(x, n):
    return x + 0.3 * DIRECTION if n == 2 else x


def ablated(name, x, layer):
    if (name, layer) == ("heads", 1):
        return x.at[:, :, 0].set(0)
    if (name, layer) == ("neurons", 2):
        return x.at[..., :20].set(0)
    return 1.5 * x if (name, layer) in (("attention", 2), ("mlp", 0)) else x


SEAMS = {"residual": {"residual": steered}, "component": {"component": ablated}}


def recomputed(model, prompt, count, **seams):
    """The whole sequence again for every token, at one padded length."""
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (96 - len(tokens))], jnp.int32)
        tokens.append(int(rl.forward(model.params, model.config, padded, **seams)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("which", SEAMS)
def test_intervening_in_cached_generation_is_recomputing_everything(model, which):
    seams = SEAMS[which]
    expected = [recomputed(model, prompt, 12, **seams) for prompt in PROMPTS]
    assert expected != [recomputed(model, prompt, 12) for prompt in PROMPTS]
    assert [output.tokens for output in rl.generate(model, PROMPTS, GREEDY, **seams)] == expected
    # In chunks of 16, a few together, some of whose prompts begin with pages that others have left.
    with rl.Engine(model, max_batch_size=2, max_length=128, cache_tokens=640, prefill_tokens=16, **seams) as engine:
        for prompt in PROMPTS * 2:
            engine.submit(prompt, GREEDY)
        outputs = {chunk.index: chunk.output.tokens for chunk in engine.run() if chunk.output}
        assert engine.stats().prefix_hit_rate > 0
    assert [outputs[n] for n in range(10)] == expected * 2


def adjusted(logits, context):
    """No token of the parity of the one before; the third is always 7, the likeliest is worth less and less."""
    even = jnp.arange(logits.shape[1]) % 2
    logits = jnp.where(even == context.previous[:, None] % 2, -jnp.inf, logits)
    logits = jnp.where(context.output_lengths[:, None] == 2, jnp.zeros_like(logits).at[:, 7].set(1e4), logits)
    return logits / context.positions[:, None] * (1 + context.seeds[:, 1:] % 2)


def test_adjust_is_told_of_each_token_what_it_is(model):
    """Greedy, drawn, penalized, in chunks and in any company: as in a loop over `forward`."""
    asked = [
        rl.SamplingParams(max_tokens=12, **some)
        for some in (
            {"temperature": 0.0},
            {"seed": 3},
            {"seed": 4, "top_k": 9, "temperature": 0.2},
            {"seed": 5, "min_tokens": 2, "logprobs": 1},
            {"temperature": 0.0, "repetition_penalty": 1.5},
        )
    ]
    outputs = rl.generate(model, PROMPTS, asked, adjust=adjusted)
    for prompt, params, output in zip(PROMPTS, asked, outputs, strict=True):
        state, plan = rl.make_sampling_state([params], [prompt], [output.seed], 509)
        tokens = list(prompt)
        for _ in range(12):
            padded = jnp.asarray([tokens + [0] * (96 - len(tokens))], jnp.int32)
            logits = rl.forward(model.params, model.config, padded)[:, len(tokens) - 1]
            context = rl.TokenContext(
                *(jnp.array([n]) for n in (len(tokens), tokens[-1], len(tokens) - len(prompt))), state.settings.seeds
            )
            token, _, state = rl.sample(adjusted(logits, context), state, context.positions, plan)
            tokens.append(int(token[0]))
        assert output.tokens == tokens[len(prompt) :]
        assert output.tokens[2] == 7
    with rl.Engine(model, max_batch_size=2, max_length=128, prefill_tokens=16, adjust=adjusted) as engine:
        for prompt, params, output in zip(PROMPTS, asked, outputs, strict=True):
            engine.submit(prompt, dataclasses.replace(params, seed=output.seed))
        again = {chunk.index: chunk.output.tokens for chunk in engine.run() if chunk.output}
    assert [again[n] for n in range(5)] == [output.tokens for output in outputs]


def test_the_same_functions_compile_once(model):
    def programs():
        return rl.prefill._cache_size(), slots.decode_slots._cache_size(), slots.enter_slots._cache_size()

    seams = {"residual": steered, "component": ablated, "adjust": adjusted}
    rl.generate(model, PROMPTS, GREEDY, **seams)
    before = programs()
    rl.generate(model, PROMPTS[::-1], GREEDY, **seams)
    assert programs() == before
