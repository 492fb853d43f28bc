"""config.json -> ModelConfig -> tensor names, for published configs, in old and new form, and for bad ones."""

import copy
import json
import math

import jax
import pytest

import ridgeline as rl
from ridgeline.model.hf import FAMILIES, config_from_hf, family_of
from ridgeline.model.params import float_specs
from ridgeline.model.presets import PRESETS

PUBLISHED = PRESETS | {
    # microsoft/Phi-3-mini-128k-instruct, with the series of Phi-4-mini in place of its own forty-eight factors
    "phi-3-mini-128k": PRESETS["phi-3-mini-4k"]
    | {
        "max_position_embeddings": 131_072,
        "rope_scaling": PRESETS["phi-4-mini"]["rope_scaling"],
        "sliding_window": 262_144,
    },
    # Qwen/Qwen1.5-MoE-A2.7B
    "qwen1.5-moe-a2.7b": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "decoder_sparse_step": 1,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "model_type": "qwen2_moe",
        "moe_intermediate_size": 1408,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1_000_000.0,
        "shared_expert_intermediate_size": 5632,
        "sliding_window": 32_768,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151_936,
    },
    # allenai/OLMoE-1B-7B-0924
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 50_304,
    },
}


def _hf(name, **changes):
    config = copy.deepcopy(PUBLISHED[name]) | changes
    return {key: value for key, value in config.items() if value is not ...}


def _rope(config, layer=0):
    return config.layers[layer].rope


@pytest.mark.parametrize("name", PUBLISHED)
def test_tensor_map_fills_every_parameter_once(name):
    config = config_from_hf(_hf(name))
    specs = jax.tree_util.tree_leaves_with_path(float_specs(config))
    sizes = {".".join(str(getattr(k, "key", getattr(k, "idx", ""))) for k in path): spec.size for path, spec in specs}
    places = family_of(config).tensors(config)
    assert places.keys() == sizes.keys()
    for path, pieces in places.items():
        rows = [piece.rows or (0, piece.shape[0]) for piece in pieces]
        tails = [math.prod(piece.shape[1:]) for piece in pieces]
        assert sum((b - a) * tail for (a, b), tail in zip(rows, tails, strict=True)) == sizes[path], path


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_rewrites_the_same_model(name):
    transformers = pytest.importorskip("transformers")
    hf = _hf(name)
    rewritten = json.loads(transformers.AutoConfig.for_model(**copy.deepcopy(hf)).to_json_string())
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    assert config_from_hf(rewritten) == config_from_hf(hf)


def test_llama_3_1():
    config = config_from_hf(_hf("llama-3.1-8b"))
    assert (config.family, config.num_layers, config.q_per_kv, config.head_dim) == ("llama", 32, 4, 128)
    assert config.dtype == "bfloat16"
    assert config.query_scale == 128**-0.5
    expected = rl.RopeConfig(
        128,
        500_000.0,
        "llama3",
        factor=8.0,
        original_max_position=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )
    assert _rope(config) == expected


def test_llama_heads_need_not_fill_the_embedding():
    assert config_from_hf(_hf("llama-3.2-1b", head_dim=20)).head_dim == 20
    assert config_from_hf(_hf("llama-3.2-1b", head_dim=None)).head_dim == 64
    assert config_from_hf(_hf("llama-3.2-1b", num_key_value_heads=...)).num_kv_heads == 32


def test_mistral_window():
    assert {layer.window for layer in config_from_hf(_hf("mistral-7b-v0.1")).layers} == {4096}
    assert {layer.window for layer in config_from_hf(_hf("mistral-7b-v0.3")).layers} == {None}


def test_qwen_windows():
    assert {layer.window for layer in config_from_hf(_hf("qwen2.5-7b")).layers} == {None}
    sliding = config_from_hf(_hf("qwen2.5-7b", use_sliding_window=True, sliding_window=77, max_window_layers=20))
    assert [layer.window for layer in sliding.layers] == [None] * 20 + [77] * 8
    types = ["sliding_attention", "full_attention"] * 18
    stated = config_from_hf(_hf("qwen3-8b", use_sliding_window=True, sliding_window=77, layer_types=types))
    assert [layer.window for layer in stated.layers] == [77, None] * 18


def test_qwen_biases_and_norms():
    qwen2, qwen3 = config_from_hf(_hf("qwen2.5-7b")), config_from_hf(_hf("qwen3-8b"))
    assert (qwen2.qkv_bias, qwen2.out_bias, qwen2.qk_norm) == (True, False, None)
    assert (qwen3.qkv_bias, qwen3.out_bias, qwen3.qk_norm) == (False, False, "head")
    assert config_from_hf(_hf("qwen3-8b", head_dim=...)).head_dim == 128


# As the model cards state them, in thousands of millions: all, those of a token, and how many of the embedding and the
# output projection the second does not count.
SIZES = {
    "mixtral-8x7b": (46.7, 12.9, 0),
    "mixtral-8x22b": (140.6, 39.1, 0),
    "qwen1.5-moe-a2.7b": (14.3, 2.7, 0),
    "qwen3-30b-a3b": (30.5, 3.3, 0),
    "qwen3-235b-a22b": (235, 22, 0),
    "olmoe-1b-7b": (6.9, 1.3, 0),
    "gpt-oss-20b": (20.9, 3.6, 1),
    "gpt-oss-120b": (116.8, 5.1, 1),
    "glm-4.5-air": (106, 12, 2),
}


@pytest.mark.parametrize("name", SIZES)
def test_experts_are_as_many_as_the_model_cards_say(name):
    config, (total, active, left_out) = config_from_hf(_hf(name)), SIZES[name]
    assert rl.count_parameters(config) / 1e9 == pytest.approx(total, rel=0.01)
    counted = rl.count_parameters(config, active=True) - left_out * config.vocab_size * config.embed_dim
    assert counted / 1e9 == pytest.approx(active, rel=0.03)


def test_layers_of_experts_and_dense_ones():
    def kinds(name, **changes):
        return [layer.mlp for layer in config_from_hf(_hf(name, **changes)).layers]

    assert kinds("glm-4.5-air") == ["dense"] + ["experts"] * 45
    assert kinds("glm-4.5-air", num_hidden_layers=2, first_k_dense_replace=5) == ["dense"] * 2
    changes = {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    assert kinds("qwen3-30b-a3b", **changes) == ["dense", "experts", "dense", "dense", "dense"]


def test_routers_of_the_families():
    def experts(name, **changes):
        return config_from_hf(_hf(name, **changes)).experts

    assert experts("mixtral-8x7b") == rl.ExpertsConfig(8, 2, 14_336)
    assert experts("qwen3-30b-a3b") == rl.ExpertsConfig(128, 8, 768)
    assert experts("qwen3-30b-a3b", norm_topk_prob=...).renormalize is False
    assert experts("qwen3-30b-a3b", num_experts=..., num_local_experts=16).count == 16
    shared = rl.ExpertsConfig(60, 4, 1408, renormalize=False, shared_ffn_dim=5632, shared_gate=True)
    assert experts("qwen1.5-moe-a2.7b") == shared
    gpt_oss = rl.ExpertsConfig(128, 4, 2880, router_bias=True, mlp_bias=True, swiglu_limit=7.0)
    assert experts("gpt-oss-120b") == gpt_oss
    glm = experts("glm-4.5-air", n_group=8, topk_group=4, routed_scaling_factor=2.5)
    assert (glm.scores, glm.groups, glm.groups_per_token, glm.scale) == ("sigmoid", 8, 4, 2.5)
    assert glm.selection_bias
    assert glm.renormalize
    assert not glm.router_bias


def test_gpt_oss_has_windows_sinks_and_yarn():
    config = config_from_hf(_hf("gpt-oss-20b"))
    assert config.attn_sinks
    assert [layer.window for layer in config.layers] == [128, None] * 12
    assert (_rope(config).kind, _rope(config).truncate, _rope(config).theta) == ("yarn", False, 150_000.0)
    assert _rope(config).attention_factor == pytest.approx(1.3465735902799727)
    bare = config_from_hf(_hf("gpt-oss-20b", rope_scaling=..., layer_types=..., swiglu_limit=...))
    assert bare == config


def test_qwen_yarn():
    scaling = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}
    rope = _rope(config_from_hf(_hf("qwen2.5-7b", rope_scaling=scaling)))
    assert (rope.kind, rope.factor, rope.original_max_position) == ("yarn", 4.0, 32768)
    assert rope.attention_factor == pytest.approx(1.1386294361)


@pytest.mark.parametrize(
    ("name", "stated", "scaling", "expected"),
    [
        ("qwen2.5-7b", 32, {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ("qwen3-8b", 40, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ("qwen3-8b", 200, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 200),
        ("llama-3.1-8b", 32, {"type": "yarn", "factor": 4.0}, 128),
        ("llama-3.1-8b", 32, {"type": "linear", "factor": 4.0}, 128),
        ("llama-3.1-8b", 32, {"type": "dynamic", "factor": 2.5}, 80),
        ("llama-3.1-8b", 32, PRESETS["llama-3.1-8b"]["rope_scaling"], 32),
        ("phi-3-mini-128k", 64, PRESETS["phi-4-mini"]["rope_scaling"], 64),
        ("gemma-3-1b", 32, {"rope_type": "linear", "factor": 8.0}, 32),
    ],
)
def test_scaling_stretches_the_context(name, stated, scaling, expected):
    assert config_from_hf(_hf(name, max_position_embeddings=stated, rope_scaling=scaling)).max_position == expected


def test_bare_decoders_and_text_parts():
    for name in PUBLISHED:
        head = PUBLISHED[name]["architectures"][0]
        bare = "Gemma3TextModel" if "Gemma3" in head else head.replace("ForCausalLM", "Model")
        assert config_from_hf(_hf(name, architectures=[bare])) == config_from_hf(_hf(name))
    text = _hf("gemma-3-1b", architectures=..., torch_dtype=..., vocab_size=..., num_attention_heads=...)
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "torch_dtype": "float16", "vision_config": {}}
    config = config_from_hf(whole | {"model_type": "gemma3", "text_config": text | {"torch_dtype": "bfloat16"}})
    expected = config_from_hf(_hf("gemma-3-1b", vocab_size=262_208, num_attention_heads=8, torch_dtype="float16"))
    assert config == expected


def test_null_is_no_default_in_a_text_part_either():
    text = _hf("mistral-7b-v0.3", architectures=..., sliding_window=None, rope_scaling=None)
    config = config_from_hf({"architectures": ["Mistral3ForConditionalGeneration"], "text_config": text})
    assert {layer.window for layer in config.layers} == {None}


def test_gemma_2():
    config = config_from_hf(_hf("gemma-2-9b"))
    assert [layer.window for layer in config.layers] == [4096, None] * 21
    assert (config.attn_soft_cap, config.logit_soft_cap) == (50.0, 30.0)
    assert (config.activation, config.norm_offset, config.norm_position) == ("gelu_tanh", 1.0, "sandwich")
    assert config.embed_scale == 3584**0.5
    assert config.query_scale == 1 / 16
    assert config_from_hf(_hf("gemma-2-9b", attn_logit_softcapping=None)).attn_soft_cap is None


@pytest.mark.parametrize("name", ["gemma-2-9b", "gemma-3-1b"])
def test_gemma_keys_that_published_configs_omit(name):
    assert "tie_word_embeddings" not in PUBLISHED[name]
    config = config_from_hf(_hf(name))
    assert config.tie_embeddings
    omitted = ("hidden_activation", "query_pre_attn_scalar", "head_dim", "rms_norm_eps")
    assert config_from_hf(_hf(name, **dict.fromkeys(omitted, ...))) == config


def test_gemma_3():
    config = config_from_hf(_hf("gemma-3-1b"))
    windows = [layer.window for layer in config.layers]
    assert windows == ([512] * 5 + [None]) * 4 + [512] * 2
    assert {layer.rope.theta for layer in config.layers if layer.window} == {10_000.0}
    assert {layer.rope.theta for layer in config.layers if not layer.window} == {1_000_000.0}
    scaled = config_from_hf(_hf("gemma-3-1b", rope_scaling={"rope_type": "linear", "factor": 8.0}))
    assert (_rope(scaled, 5).kind, _rope(scaled, 5).factor, _rope(scaled, 4).kind) == ("linear", 8.0, "default")


def test_gemma_3_old_and_new_form_agree():
    types = (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2
    old = _hf("gemma-3-1b", rope_scaling={"type": "linear", "factor": 8.0}, rope_local_base_freq=5000)
    new = _hf(
        "gemma-3-1b",
        rope_theta=...,
        rope_scaling=...,
        rope_local_base_freq=...,
        sliding_window_pattern=...,
        torch_dtype=...,
        dtype="bfloat16",
        layer_types=types,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000},
            "sliding_attention": {"rope_type": "default", "rope_theta": 5000},
        },
    )
    assert config_from_hf(new) == config_from_hf(old)


def test_old_and_new_form_agree():
    old = _hf("llama-3.1-8b")
    parameters = {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    new = _hf("llama-3.1-8b", rope_scaling=..., rope_theta=..., rope_parameters=parameters)
    assert config_from_hf(new) == config_from_hf(old)


def test_phi_3():
    short, long = config_from_hf(_hf("phi-3-mini-4k")), config_from_hf(_hf("phi-3-mini-128k"))
    assert (short.layers[0].window, _rope(short).kind, _rope(short).rotary_dim) == (2047, "default", 96)
    rope = _rope(long)
    assert (rope.kind, rope.original_max_position, len(rope.long_factor)) == ("longrope", 4096, 48)
    assert rope.attention_factor == pytest.approx((1 + 5 / 12) ** 0.5)  # log(32) / log(4096)
    phi4 = config_from_hf(_hf("phi-4-mini"))
    assert (_rope(phi4).rotary_dim, phi4.head_dim, phi4.tie_embeddings) == (96, 128, True)


@pytest.mark.parametrize("kind", ["su", "yarn"])
def test_phi_3_first_revisions_name_longrope_otherwise(kind):
    scaling = _hf("phi-3-mini-128k")["rope_scaling"] | {"type": kind}
    assert config_from_hf(_hf("phi-3-mini-128k", rope_scaling=scaling)) == config_from_hf(_hf("phi-3-mini-128k"))


def test_phi_3_reads_fused_tensors_by_rows():
    config = config_from_hf(_hf("phi-4-mini"))
    pieces = family_of(config).tensors(config)["layers.31.qkv"]
    assert {piece.tensor for piece in pieces} == {"model.layers.31.self_attn.qkv_proj.weight"}
    assert [piece.rows for piece in pieces] == [(0, 3072), (3072, 4096), (4096, 5120)]


def test_olmo_2():
    config = config_from_hf(_hf("olmo-2-7b"))
    assert (config.norm_position, config.qk_norm, config.norm_eps) == ("post", "full", 1e-6)


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_type_stands_in_for_the_architecture(name):
    assert config_from_hf(_hf(name, architectures=...)) == config_from_hf(_hf(name))


@pytest.mark.parametrize(
    ("stated", "dtype"), [("torch.bfloat16", "bfloat16"), ("float16", "float16"), (None, "float32"), (..., "float32")]
)
def test_dtype(stated, dtype):
    assert config_from_hf(_hf("llama-3.1-8b", torch_dtype=stated)).dtype == dtype


def test_transformers_5_dtype_key():
    assert config_from_hf(_hf("llama-3.1-8b", torch_dtype=..., dtype="bfloat16")).dtype == "bfloat16"


LONGROPE = PRESETS["phi-4-mini"]["rope_scaling"]
YARN = {"type": "yarn", "factor": 4.0}
BAD = [
    ({"architectures": ["GPT2LMHeadModel"]}, "architecture GPT2LMHeadModel is not supported; supported: Llama.*Olmo2"),
    (
        {"architectures": [], "model_type": "gpt2"},
        "model_type 'gpt2' is not supported; supported: llama, .*gemma3_text",
    ),
    ({"architectures": ..., "model_type": ...}, "model_type None is not supported"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu', expected one of silu"),
    ({"rope_scaling": {"rope_type": "mrope"}}, "rope_scaling.rope_type is 'mrope', expected one of default, linear"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn', expected an object"),
    ({"rope_scaling": {"type": "linear"}}, "has no 'rope_scaling.factor', expected a number from 0.001"),
    ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor is -2, expected a number from 0.001"),
    ({"rope_scaling": {"type": "llama3", "factor": 8}}, "has no 'rope_scaling.low_freq_factor'"),
    ({"rope_scaling": {"type": "longrope", "factor": 8}}, "has no 'rope_scaling.original_max_position_embeddings'"),
    (
        {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": 8}},
        "has no 'rope_scaling.short_factor'",
    ),
    ({"rope_theta": "10000"}, "rope_theta is '10000', expected a number above 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which is not supported: llama rotates"),
    ({"hidden_size": ...}, "config.json has no 'hidden_size'"),
    ({"vocab_size": None}, "config.json has no 'vocab_size'"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a whole number from 1 to 4,096"),
    ({"hidden_size": "4096"}, "hidden_size is '4096', expected a whole number"),
    ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', expected a number from 1e-12 to 1"),
    ({"num_key_value_heads": 5}, "num_heads 32 is not a multiple of num_kv_heads 5"),
    ({"num_attention_heads": 24, "num_key_value_heads": 8}, "hidden_size 4096 is not a multiple of"),
    ({"head_dim": 33}, "rotary_dim is 33"),
    ({"torch_dtype": "float64"}, "torch_dtype is 'float64', expected one of float32, bfloat16"),
    ({"hidden_act": []}, r"hidden_act is \[\], expected one of silu"),
    ({"architectures": 5}, "architectures is 5, expected a list of a text"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM', expected a list"),
    ({"layer_types": 5, "model_type": "gemma2", "architectures": ...}, "layer_types is 5, expected a list"),
    ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected"),
    ({"rms_norm_eps": -1}, "rms_norm_eps is -1, expected"),
    ({"rms_norm_eps": 1e300}, "rms_norm_eps is 1e.300, expected"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, expected"),
    ({"rope_theta": float("inf")}, "rope_theta is inf, expected"),
    ({"rope_theta": 1e-300}, "rope_theta is 1e-300, expected"),
    ({"max_position_embeddings": 10**30}, "max_position_embeddings is 1000.*, expected"),
    ({"attention_bias": "false"}, "attention_bias is 'false', expected true or false"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
    ({"rope_scaling": YARN | {"factor": 1e308}}, "factor is 1e.308, expected"),
    ({"rope_scaling": YARN | {"beta_fast": [1]}}, r"beta_fast is \[1\], expected a number"),
    ({"rope_scaling": YARN | {"beta_fast": 1, "beta_slow": 2}}, "beta_fast 1.0 must not be below beta_slow 2.0"),
    ({"rope_scaling": YARN | {"mscale": "x"}}, "mscale is 'x', expected a number"),
    ({"rope_scaling": YARN | {"attention_factor": float("nan")}}, "attention_factor is nan, expected"),
    ({"rope_scaling": YARN | {"factor": 1e6}}, "max_position is 131072000000; positions are counted in 32 bits"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_config_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(_hf("llama-3.1-8b", **changes))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("mistral-7b-v0.1", {"layer_types": ["full_attention"] * 32}, "layer_types .* not supported"),
        ("mistral-7b-v0.1", {"sliding_window": 0}, "sliding_window is 0, expected"),
        ("gemma-2-9b", {"layer_types": ["full_attention"]}, "layer_types has 1 entries; num_hidden_layers is 42"),
        (
            "gemma-2-9b",
            {"layer_types": ["full_attention"] * 41 + ["linear_attention"]},
            r"layer_types\[41\] is 'linear",
        ),
        ("gemma-2-9b", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma-3-1b", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0, which is not supported"),
        (
            "gemma-3-1b",
            {"architectures": ["Gemma3ForConditionalGeneration"]},
            "has no 'text_config', expected an object",
        ),
        (
            "llama-3.1-8b",
            {"rope_scaling": {"type": "yarn", "factor": float("inf")}},
            "rope_scaling.factor is inf, expected",
        ),
        ("phi-4-mini", {"rope_scaling": LONGROPE | {"long_factor": [1, None]}}, r"long_factor\[1\] is None, expected"),
        ("phi-4-mini", {"rope_scaling": LONGROPE | {"short_factor": [0.0]}}, r"short_factor\[0\] is 0.0, expected"),
        ("phi-4-mini", {"partial_rotary_factor": 0.5}, "longrope short_factor has 48 entries; rotary_dim 64 needs 32"),
    ],
)
def test_bad_family_config_is_refused(name, changes, message):
    with pytest.raises(ValueError, match=message):
        config_from_hf(_hf(name, **changes))


def test_harmless_keys_are_ignored():
    plain = config_from_hf(_hf("llama-3.1-8b"))
    assert (
        config_from_hf(_hf("llama-3.1-8b", pretraining_tp=2, attention_dropout=0.1, quantization_config=None)) == plain
    )


def test_unknown_family_is_refused():
    with pytest.raises(ValueError, match="family 'gpt2' is not known; known: llama"):
        family_of(config_from_hf(_hf("llama-3.1-8b")).replace(family="gpt2"))


def test_every_family_is_published_and_named_once():
    assert {config_from_hf(_hf(name)).family for name in PUBLISHED} == set(FAMILIES)
    for attribute in ("architectures", "model_types"):
        names = [name for family in FAMILIES.values() for name in getattr(family, attribute)]
        assert len(names) == len(set(names))
