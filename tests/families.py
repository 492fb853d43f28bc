"""Random checkpoints of every family in sizes that divide over eight devices."""

import json
import pathlib

import numpy as np
import safetensors.numpy

from ridgeline.model.hf import config_from_hf, family_of

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "parity"
# Divisible by 8 and by 3, so that every mesh below is legal.
SIZES = {"vocab_size": 528, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"moe_intermediate_size": 48, "shared_expert_intermediate_size": 48}
SIZES |= dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 12)


def write_checkpoint(directory: pathlib.Path, family: str, heads: int, kv_heads: int, **sizes: int) -> pathlib.Path:
    """A random checkpoint of a family, in sizes that divide; norms and biases are perturbed too."""
    hf = json.loads((FIXTURES / family / "config.json").read_text()) | SIZES
    hf |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "torch_dtype": "float32"} | sizes
    if "layer_types" in hf:
        hf["layer_types"] = hf["layer_types"][-2:]
    config = config_from_hf(hf)
    rng = np.random.default_rng(0)
    tensors = {}
    for pieces in family_of(config).tensors(config).values():
        for piece in pieces:
            scale = piece.shape[-1] ** -0.5 if len(piece.shape) > 1 else 0.2
            tensors[piece.tensor] = (rng.standard_normal(piece.shape) * scale).astype(np.float32)
            if len(piece.shape) == 1 and not config.norm_offset:
                tensors[piece.tensor] += 1
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(hf))
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    return directory
