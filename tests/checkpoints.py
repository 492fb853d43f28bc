"""Checkpoints that the loading tests write: whole, sharded, and damaged on purpose."""

import itertools
import json
import re
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ridgeline.model.checkpoint import CheckpointError
from ridgeline.model.hf import config_from_hf, family_of
from ridgeline.model.loading import load_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 29,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "attention_bias": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False}
EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "I8", "float64": "F64", "uint8": "U8"}
NAMES |= {"int32": "I32", "int64": "I64", "float8_e4m3fn": "F8_E4M3"}
FIXTURES = Path(__file__).parent / "fixtures" / "parity"


def random_tensors(hf: dict, dtype="float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor that the configuration calls for; small multiples of 1/8, which all three dtypes hold exactly."""
    config, rng = config_from_hf(hf), np.random.default_rng(seed)
    shapes = {p.tensor: p.shape for pieces in family_of(config).tensors(config).values() for p in pieces}
    return {name: (rng.integers(-40, 40, shape) / 8).astype(jnp.dtype(dtype)) for name, shape in shapes.items()}


def save_chain(directory: Path, chain: dict[int, int], hf: dict = LLAMA, size: int = 32) -> None:
    """A model that makes `chain[token]` after each token, by some 40 over every other."""
    hf = hf | {"vocab_size": size, "hidden_size": size, "attention_bias": False}
    tensors = {name: np.zeros_like(tensor) for name, tensor in random_tensors(hf).items()}
    tensors |= {name: np.ones_like(tensor) for name, tensor in tensors.items() if name.endswith("norm.weight")}
    tensors[EMBEDDING] = np.eye(size, dtype="float32")
    for token, after in chain.items():
        tensors["lm_head.weight"][after, token] = 7.0
    save(directory, hf, tensors)


def write(file: Path, tensors: dict[str, np.ndarray], edit=None, cut: int = 0, tail: bytes = b"") -> None:
    """A safetensors file, by the format's text; `edit` changes the header before it is written."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [offset, offset + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": offsets}
        offset += tensor.nbytes
    if edit is not None:
        edit(header)
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 64)  # aligned as XLA wants it, so that nothing but the reader makes copies
    data = struct.pack("<Q", len(text)) + text + b"".join(t.tobytes() for t in tensors.values()) + tail
    file.write_bytes(data[: len(data) - cut])


def save(directory: Path, hf: dict = LLAMA, tensors: dict | None = None, **options) -> dict[str, np.ndarray]:
    tensors = random_tensors(hf) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(hf))
    write(directory / "model.safetensors", tensors, **options)
    return tensors


def save_shards(directory: Path, hf: dict = LLAMA, tensors: dict | None = None, shards: int = 3) -> dict:
    """Sharded, one tensor after the other in turn; returns the index."""
    tensors = random_tensors(hf) if tensors is None else tensors
    (directory / "config.json").write_text(json.dumps(hf))
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        write(directory / file, dict(list(tensors.items())[i::shards]))
    index = {"metadata": {}, "weight_map": dict(zip(tensors, itertools.cycle(files)))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def assert_same(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def refused(directory: Path | str, *patterns: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(directory)
    message = str(caught.value)
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in {message!r}"
    assert "\n" not in message
    return message
