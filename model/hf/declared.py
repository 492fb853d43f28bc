"""What config.json may hold: the kind of every field that any family reads."""

from ..config import DTYPES, ROPE_KINDS
from ..fields import Kind, an_object, any_of, anything, flag, list_of, number, object_of, one_of, text, whole

SLIDING, FULL = "sliding_attention", "full_attention"
"""The types of layers."""

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""`hidden_act` -> `ModelConfig.activation`."""

_MOST_LAYERS = 4096
_SIZE, _HEADS = whole(1, 2**24), whole(1, 2**16)
_EXPERTS = whole(1, 2**14)
_FACTOR, _ROTATIONS, _THETA = number(1e-3, 1e6), number(0, 1e6), number(1, 1e15, above=True)
_DTYPE = one_of(*DTYPES, *(f"torch.{dtype}" for dtype in DTYPES))
_TOKENS = list_of(whole(-1), one=True)
"""Token ids, one or some; -1 is none."""
_NAMES = list_of(text)

_ROPE: dict[str, Kind] = {
    "type": one_of(*ROPE_KINDS),
    "rope_type": one_of(*ROPE_KINDS),
    "rope_theta": _THETA,
    "partial_rotary_factor": number(0, 1, above=True),
    "factor": _FACTOR,
    "low_freq_factor": _FACTOR,
    "high_freq_factor": _FACTOR,
    "max_position_embeddings": whole(),
    "original_max_position_embeddings": whole(2),
    "beta_fast": _ROTATIONS,
    "beta_slow": _ROTATIONS,
    "truncate": flag,
    "mscale": number(0, 1e3),
    "mscale_all_dim": number(0, 1e3),
    "attention_factor": number(0, 1e3, above=True),
    "short_factor": list_of(_FACTOR),
    "long_factor": list_of(_FACTOR),
}
ROPE = _ROPE | {kind: an_object(_ROPE) for kind in (FULL, SLIDING)}
"""`rope_scaling` and `rope_parameters`, which Gemma 3 states a type of layer."""

_WEIGHTS: dict[str, Kind] = {
    "num_bits": whole(1, 64),
    "type": text,
    "symmetric": flag,
    "dynamic": any_of(flag, text),
    "actorder": any_of(flag, text),
    "strategy": text,
    "group_size": whole(-1),
    "block_structure": list_of(whole(), 2, 2),
}
_GROUP: dict[str, Kind] = {
    "format": text,
    "weights": an_object(_WEIGHTS),
    "input_activations": an_object(_WEIGHTS),
    "output_activations": anything,
    "targets": _NAMES,
}
QUANTIZATION: dict[str, Kind] = {
    "file": text,
    "quant_method": text,
    "format": text,
    "checkpoint_format": text,
    "bits": whole(1, 64),
    "w_bit": whole(1, 64),
    "group_size": whole(-1),
    "q_group_size": whole(-1),
    "version": text,
    "backend": text,
    "zero_point": flag,
    "sym": flag,
    "desc_act": flag,
    "lm_head": flag,
    "is_marlin_format": flag,
    "dynamic": anything,
    "modules_in_block_to_quantize": list_of(_NAMES),
    "modules_to_not_convert": _NAMES,
    "ignored_layers": _NAMES,
    "exclude_modules": _NAMES,
    "ignore": _NAMES,
    "fmt": text,
    "activation_scheme": text,
    "weight_block_size": list_of(whole(), 2, 2),
    "quant_algo": text,
    "transform_config": anything,
    "sparsity_config": an_object({"format": text}),
    "config_groups": object_of(an_object(_GROUP), least=1),
}
QUANTIZATION |= {"quantization": an_object(QUANTIZATION)}
"""`quantization_config`, and the older files that say the same."""

CONFIG: dict[str, Kind] = {
    "architectures": _NAMES,
    "model_type": text,
    "text_config": an_object({}),
    "vocab_size": _SIZE,
    "hidden_size": _SIZE,
    "intermediate_size": _SIZE,
    "num_hidden_layers": whole(1, _MOST_LAYERS),
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _HEADS,
    "head_dim": whole(1, 2**16),
    "max_position_embeddings": _ROPE["max_position_embeddings"],
    "original_max_position_embeddings": _ROPE["original_max_position_embeddings"],
    "rms_norm_eps": number(1e-12, 1),
    "rope_theta": _THETA,
    "rope_local_base_freq": _THETA,
    "rope_scaling": an_object(ROPE),
    "rope_parameters": an_object(ROPE),
    "partial_rotary_factor": _ROPE["partial_rotary_factor"],
    "hidden_act": one_of(*ACTIVATIONS),
    "hidden_activation": one_of(*ACTIVATIONS),
    "tie_word_embeddings": flag,
    "attention_bias": flag,
    "mlp_bias": flag,
    "use_bidirectional_attention": flag,
    "layer_types": list_of(one_of(SLIDING, FULL), most=_MOST_LAYERS),
    "sliding_window": whole(),
    "use_sliding_window": flag,
    "max_window_layers": whole(0),
    "sliding_window_pattern": whole(1, _MOST_LAYERS),
    "num_local_experts": _EXPERTS,
    "num_experts": _EXPERTS,
    "n_routed_experts": _EXPERTS,
    "num_experts_per_tok": _EXPERTS,
    "moe_intermediate_size": _SIZE,
    "shared_expert_intermediate_size": _SIZE,
    "n_shared_experts": whole(0, 2**8),
    "norm_topk_prob": flag,
    "routed_scaling_factor": number(0, 1e3, above=True),
    "n_group": _EXPERTS,
    "topk_group": _EXPERTS,
    "first_k_dense_replace": whole(0, _MOST_LAYERS),
    "decoder_sparse_step": whole(1, _MOST_LAYERS),
    "mlp_only_layers": list_of(whole(0, _MOST_LAYERS)),
    "use_qk_norm": flag,
    "qkv_bias": flag,
    "clip_qkv": number(0, 1e6),
    "swiglu_limit": number(0, 1e6, above=True),
    "swiglu_alpha": number(0, 1e3, above=True),
    "query_pre_attn_scalar": number(1e-3, 1e6),
    "attn_logit_softcapping": number(1e-3, 1e6),
    "final_logit_softcapping": number(1e-3, 1e6),
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    "eos_token_id": _TOKENS,
    "bos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
    "quantization_config": an_object(QUANTIZATION),
    "compression_config": an_object(QUANTIZATION),
}
"""config.json. Bounds of sizes lie far beyond any model's: they keep what is computed of them within reach."""
