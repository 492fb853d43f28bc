"""Well-known models by name: configurations only, no weights.

Each is the published config.json, cut to the keys that shape the network, and read by the family it belongs to.
Source: the model's own repository on the Hugging Face Hub, whose name is in the comment.
"""

from typing import Any

from .config import ModelConfig
from .hf import config_from_hf

_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}

_LLAMA_3 = _LLAMA | {
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_theta": 500_000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128_256,
}

_LLAMA_3_SMALL = _LLAMA_3 | {
    "rope_scaling": _LLAMA_3["rope_scaling"] | {"factor": 32.0},
    "tie_word_embeddings": True,
}

_MISTRAL_7B = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "max_position_embeddings": 32_768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

_QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1_000_000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 151_936,
}

_GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "sliding_window": 4096,
    "torch_dtype": "float32",
    "vocab_size": 256_000,
}

_PHI_MINI = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "hidden_act": "silu",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "torch_dtype": "bfloat16",
}

PRESETS: dict[str, dict[str, Any]] = {
    # meta-llama/Llama-2-7b-hf
    "llama-2-7b": _LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vocab_size": 32_000,
    },
    # meta-llama/Llama-3.1-8B, -70B, -405B
    "llama-3.1-8b": _LLAMA_3
    | {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32, "num_hidden_layers": 32},
    "llama-3.1-70b": _LLAMA_3
    | {"hidden_size": 8192, "intermediate_size": 28_672, "num_attention_heads": 64, "num_hidden_layers": 80},
    "llama-3.1-405b": _LLAMA_3
    | {"hidden_size": 16_384, "intermediate_size": 53_248, "num_attention_heads": 128, "num_hidden_layers": 126},
    # meta-llama/Llama-3.2-1B, -3B
    "llama-3.2-1b": _LLAMA_3_SMALL
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
    },
    "llama-3.2-3b": _LLAMA_3_SMALL
    | {
        "head_dim": 128,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_hidden_layers": 28,
    },
    # mistralai/Mistral-7B-v0.1, -v0.3
    "mistral-7b-v0.1": _MISTRAL_7B | {"rope_theta": 10_000.0, "sliding_window": 4096, "vocab_size": 32_000},
    "mistral-7b-v0.3": _MISTRAL_7B | {"rope_theta": 1_000_000.0, "sliding_window": None, "vocab_size": 32_768},
    # Qwen/Qwen2.5-7B
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "max_position_embeddings": 131_072,
        "max_window_layers": 28,
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 131_072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 152_064,
    },
    # Qwen/Qwen3-8B, -32B
    "qwen3-8b": _QWEN_3
    | {
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "max_window_layers": 36,
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
    },
    "qwen3-32b": _QWEN_3
    | {
        "hidden_size": 5120,
        "intermediate_size": 25_600,
        "max_window_layers": 64,
        "num_attention_heads": 64,
        "num_hidden_layers": 64,
    },
    # google/gemma-2-9b, -27b
    "gemma-2-9b": _GEMMA_2
    | {
        "head_dim": 256,
        "hidden_size": 3584,
        "intermediate_size": 14_336,
        "num_attention_heads": 16,
        "num_hidden_layers": 42,
        "num_key_value_heads": 8,
        "query_pre_attn_scalar": 256,
    },
    "gemma-2-27b": _GEMMA_2
    | {
        "head_dim": 128,
        "hidden_size": 4608,
        "intermediate_size": 36_864,
        "num_attention_heads": 32,
        "num_hidden_layers": 46,
        "num_key_value_heads": 16,
        "query_pre_attn_scalar": 144,
    },
    # google/gemma-3-1b-it
    "gemma-3-1b": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "max_position_embeddings": 32_768,
        "num_attention_heads": 4,
        "num_hidden_layers": 26,
        "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000,
        "rope_scaling": None,
        "rope_theta": 1_000_000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
        "torch_dtype": "bfloat16",
        "vocab_size": 262_144,
    },
    # microsoft/Phi-3-mini-4k-instruct, Phi-4-mini-instruct
    "phi-3-mini-4k": _PHI_MINI
    | {
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "rope_scaling": None,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "vocab_size": 32_064,
    },
    "phi-4-mini": _PHI_MINI
    | {
        "max_position_embeddings": 131_072,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {
            "type": "longrope",
            "short_factor": [1.0] * 48,
            "long_factor": [1.118320672**index for index in range(48)],  # the published series
        },
        "sliding_window": 262_144,
        "tie_word_embeddings": True,
        "vocab_size": 200_064,
    },
    # allenai/OLMo-2-1124-7B
    "olmo-2-7b": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "max_position_embeddings": 4096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 500_000,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "vocab_size": 100_352,
    },
}
"""config.json by name."""


def preset(name: str) -> ModelConfig:
    """The configuration of a well-known model, in the dtype its checkpoint is published in.

    Args:
      name: a key of `PRESETS`, such as "llama-3.1-8b".

    Raises:
      ValueError: there is no preset of that name.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; known: {', '.join(PRESETS)}")
    return config_from_hf(PRESETS[name])
