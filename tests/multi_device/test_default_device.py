"""`jax_default_device` is where everything lies that no mesh places."""

import jax
import jax.numpy as jnp

import ridgeline as rl
from tiny import tiny_model


def test_another_default_device():
    def tokens_of(device):
        with jax.default_device(device):
            model = tiny_model()
            (output,) = rl.generate(model, [[1, 2, 3]], rl.SamplingParams(max_tokens=4, seed=1))
            logits = rl.forward(model.params, model.config, jnp.array([[1, 2, 3]]))
        assert {*logits.devices(), *jax.tree.leaves(model.params)[0].devices()} == {device}
        return output.tokens

    assert tokens_of(jax.devices()[3]) == tokens_of(jax.devices()[0])
