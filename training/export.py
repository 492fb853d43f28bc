"""Writes a trained model as a Hugging Face checkpoint folder that `transformers` loads too."""

import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save
from tokenizers import Tokenizer

from ..model.config import ModelConfig
from ..model.hf.view import hf_view
from ..model.params import Params
from .data import BEGIN, BEGIN_ID, END, END_ID

# The messages of a conversation are the pieces of one running story; the reply is what comes next.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if not loop.first and not loop.previtem.content[-1:] in " \\n" and not message.content[:1] in " \\n" %}
        {{- " " }}
    {%- endif %}
    {{- message.content }}
{%- endfor %}
"""


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """config.json of a model with Llama's architecture, as `transformers` writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": config.qkv_bias,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN_ID,
        "dtype": "bfloat16",
        "eos_token_id": END_ID,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "hidden_size": config.embed_dim,
        "initializer_range": 0.02,
        "intermediate_size": config.ffn_dim,
        "max_position_embeddings": config.max_position,
        "mlp_bias": config.mlp_bias,
        "model_type": "llama",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": config.layers[0].rope.theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def export(folder: Path, params: Params, config: ModelConfig, tokenizer: Tokenizer, curve: list[dict]) -> None:
    """Write the checkpoint folder; each file is replaced whole, so that a reader never sees half of one.

    Args:
      folder: where to; made if missing. Other files in it, such as the model card, stay.
      params: as `param_specs(config)`, any dtype.
      config: the model.
      tokenizer: with the special tokens of `data`.
      curve: one entry an evaluation, kept as training.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.asarray(tensor, jnp.bfloat16) for name, tensor in hf_view(params, config).items()}
    write(folder / "model.safetensors", save(tensors, {"format": "pt"}))
    _write_json(folder / "config.json", hf_config(config))
    generation = {"bos_token_id": BEGIN_ID, "eos_token_id": [END_ID], "do_sample": True, "temperature": 0.8}
    _write_json(folder / "generation_config.json", generation | {"top_p": 0.95})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.max_position,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
    _write_json(folder / "training.json", curve)


def write(path: Path, content: bytes) -> None:
    """Replace a file in one step: a kill leaves the old one or the new one, never a torn one."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _write_json(path: Path, content: Any) -> None:
    write(path, (json.dumps(content, indent=2) + "\n").encode())
