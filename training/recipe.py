"""What is trained: the two models' sizes and the settings of their training."""

import dataclasses

import jax

from ..model.config import LayerConfig, ModelConfig, RopeConfig
from ..model.params import Params, init_params


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Attributes:
      learning_rate: of the plateau, between warm-up and the cosine decay to zero.
      dropout: share of the MLP's hidden units and of the attention outputs left out, drawn anew each step.
      weight_decay: of matrices; norms have none.
      decay_share: share of all steps that the final decay takes.
      warmup: steps.
    """

    embed_dim: int
    num_layers: int
    ffn_dim: int
    learning_rate: float
    dropout: float
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    weight_decay: float = 0.1
    decay_share: float = 0.5
    warmup: int = 200


# The same head geometry in both, so that they shard alike.
RECIPES = {
    "story": Recipe(embed_dim=256, num_layers=5, ffn_dim=768, learning_rate=2e-3, dropout=0.1),
    "draft": Recipe(embed_dim=96, num_layers=2, ffn_dim=192, learning_rate=4e-3, dropout=0.0),
}
EPOCHS = {"story": 9, "draft": 6}


def model_config(recipe: Recipe, vocab_size: int, max_position: int) -> ModelConfig:
    """The Llama architecture of a recipe."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        embed_dim=recipe.embed_dim,
        ffn_dim=recipe.ffn_dim,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        layers=(LayerConfig(RopeConfig(recipe.head_dim)),) * recipe.num_layers,
        max_position=max_position,
        norm_eps=1e-5,
        query_scale=recipe.head_dim**-0.5,
        tie_embeddings=True,
        dtype="bfloat16",
    )


def initial_params(config: ModelConfig, key: jax.Array) -> Params:
    """Float32 master weights; what feeds the residual stream starts smaller the more layers there are (GPT-2)."""
    params = init_params(config.replace(dtype="float32"), key)
    scale = (2 * config.num_layers) ** -0.5
    for layer in params["layers"]:
        layer["out"], layer["down"] = layer["out"] * scale, layer["down"] * scale
    return params
