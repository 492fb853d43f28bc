"""GLM-4.5 and GLM-4.5-Air: sigmoid scores with a bias that selects only, one shared expert, dense first layers."""

import functools

from ..config import ExpertsConfig, ModelConfig
from ..fields import Fields
from .common import decoder_config, head_dim, rope_parameters
from .experts import expert_count, expert_tensors
from .family import Family
from .rope import rope_from_hf
from .tensors import decoder_tensors

DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131_072,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 1408,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 1,
}


def config(hf: Fields) -> ModelConfig:
    hf = DEFAULTS | hf
    layers, parameters = hf["num_hidden_layers"], rope_parameters(hf)
    fraction = parameters.get("partial_rotary_factor", hf.get("partial_rotary_factor", 0.5))
    rope = rope_from_hf(hf, parameters, int(head_dim(hf) * fraction))
    dense = min(hf["first_k_dense_replace"], layers)
    experts = ExpertsConfig(
        expert_count(hf, 128),
        hf["num_experts_per_tok"],
        hf["moe_intermediate_size"],
        scores="sigmoid",
        renormalize=hf.get("norm_topk_prob", True),
        scale=hf["routed_scaling_factor"],
        selection_bias=True,
        groups=hf["n_group"],
        groups_per_token=hf["topk_group"],
        shared_ffn_dim=hf["n_shared_experts"] * hf["moe_intermediate_size"],
    )
    return decoder_config(
        "glm4_moe",
        hf,
        ropes=[rope] * layers,
        mlps=["dense"] * dense + ["experts"] * (layers - dense),
        qk_norm="head" if hf.get("use_qk_norm") else None,
        qkv_bias=hf.get("attention_bias", False),
        experts=experts if dense < layers else None,
    )


FAMILY = Family(
    "glm4_moe",
    ("Glm4MoeForCausalLM",),
    ("glm4_moe",),
    config,
    functools.partial(decoder_tensors, experts=functools.partial(expert_tensors, shared="shared_experts")),
    unused=lambda config: f"model.layers.{config.num_layers}.",  # predicts a further token
)
