"""Tiny random models."""

import pathlib

import jax
import tokenizers

import ridgeline as rl
from ridgeline.model.generation import GenerationDefaults
from ridgeline.model.params import ParamSpec


def tiny_config(**changes) -> rl.ModelConfig:
    """A two-layer model of odd sizes, the first layer with a sliding window."""
    rope = rl.RopeConfig(rotary_dim=20)
    fields = {
        "family": "llama",
        "vocab_size": 509,
        "embed_dim": 48,
        "ffn_dim": 64,
        "num_heads": 6,
        "num_kv_heads": 3,
        "head_dim": 20,
        "layers": (rl.LayerConfig(rope, window=9), rl.LayerConfig(rope)),
        "max_position": 512,
        "norm_eps": 1e-5,
        "query_scale": 20**-0.5,
    }
    return rl.ModelConfig(**(fields | changes))


def tiny_model(config: rl.ModelConfig | None = None, seed: int = 0, **generation) -> rl.Model:
    """A random model without a tokenizer."""
    config = config or tiny_config()
    params = rl.init_params(config, jax.random.key(seed))
    return rl.Model(config, params, None, GenerationDefaults(**generation), pathlib.Path("tiny"))


def weight_spec(w, in_axes: int = 1) -> ParamSpec:
    """What `linear` wants to know of a weight on one device."""
    return ParamSpec(w.shape, "float32", (None,) * len(w.shape), in_axes=in_axes)


def byte_tokenizer() -> rl.Tokenizer:
    """One token a byte."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return rl.Tokenizer(backend)
