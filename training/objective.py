"""What a training step does: the loss through the model's own forward pass, dropout, AdamW; and the held-out loss."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.params import Params
from ..model.transformer import transformer, unembed
from .data import Windows
from .gradients import attention, cross_entropy, product
from .recipe import Recipe


def losses(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """Negative log-likelihood of each target in nats, float32."""

    def attend(q, k, v, spec, state):
        return attention(q, k, v), state

    x, _ = transformer(params, config, tokens, attend=attend, product=product)
    return cross_entropy(unembed(params, config, x, product), targets)


def drop_units(params: Params, key: jax.Array, rate: float) -> Params:
    """Dropout by weights: the columns of `down` and `out` that read a dropped unit are zero, the others scaled up."""
    if rate == 0.0:
        return params
    layers = []
    for index, layer in enumerate(params["layers"]):
        keys = jax.random.split(jax.random.fold_in(key, index))
        kept = {
            name: layer[name] * (jax.random.bernoulli(k, 1 - rate, layer[name].shape[1:]) / (1 - rate))
            for name, k in zip(("down", "out"), keys, strict=True)
        }
        layers.append(layer | kept)
    return params | {"layers": layers}


def make_optimizer(recipe: Recipe, total_steps: int) -> tuple[optax.GradientTransformation, int]:
    """AdamW with clipping, and the step at which its learning rate begins to fall.

    Until that step training does not depend on its total length, so that a run can be made longer or shorter.
    """
    decay = max(1, round(total_steps * recipe.decay_share))
    warmup, plateau_end = min(recipe.warmup, total_steps - decay), total_steps - decay

    def schedule(step):
        rising = (step + 1) / max(warmup, 1)
        falling = 0.5 * (1 + jnp.cos(math.pi * jnp.clip((step - plateau_end) / decay, 0.0, 1.0)))
        return recipe.learning_rate * jnp.minimum(jnp.minimum(rising, 1.0), falling)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    ), plateau_end


def _bfloat16(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def make_step(config: ModelConfig, recipe: Recipe, optimizer: optax.GradientTransformation, key: jax.Array):
    """The compiled training step: (params, optimizer state, step, tokens, targets) -> (params, state, mean loss)."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, step, tokens, targets):
        def mean_loss(params):
            dropped = drop_units(_bfloat16(params), jax.random.fold_in(key, step), recipe.dropout)
            return losses(_bfloat16(dropped), config, tokens, targets).mean()

        loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


def held_out_loss(params: Params, config: ModelConfig, windows: Windows, batch_size: int) -> float:
    """Summed loss of the windows in nats, with the weights rounded to bfloat16 as they are exported."""
    score = _scorer(config)
    rounded, total = _bfloat16(params), 0.0
    for first in range(0, len(windows.tokens), batch_size):
        rows = [a[first : first + batch_size] for a in (windows.tokens, windows.targets, windows.weights)]
        rows = [np.pad(a, ((0, batch_size - len(a)), (0, 0))) for a in rows]
        total += float(score(rounded, *rows))
    return total


@functools.cache
def _scorer(config: ModelConfig):
    def score(params, tokens, targets, weights):
        return (losses(params, config, tokens, targets) * weights).sum()

    return jax.jit(score)
