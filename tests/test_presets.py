"""The presets are the published models."""

import pytest

import ridgeline as rl
from ridgeline.model.find import find_config
from ridgeline.model.presets import HUB_NAMES, PRESETS

# Parameters of each checkpoint's safetensors files, as the Hub counts them.
PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2-27b": 27_227_128_320,
    "gemma-3-1b": 999_885_952,
    "phi-3-mini-4k": 3_821_079_552,
    "phi-4-mini": 3_836_021_760,
    "olmo-2-7b": 7_298_617_344,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gpt-oss-20b": 20_914_757_184,  # of which the Hub counts two experts' numbers as one, in a byte
    "gpt-oss-120b": 116_829_156_672,
    "glm-4.5-air": 106_852_251_264,  # without the layer that drafts
}


def test_every_preset_has_its_published_number_of_parameters():
    assert {name: rl.count_parameters(rl.preset(name)) for name in PRESETS} == PARAMETERS


def test_names_on_the_hub_mean_the_preset_of_that_shape(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert set(HUB_NAMES.values()) == set(PRESETS)
    for name, shape in {"Qwen/Qwen3-8B": "qwen3-8b", "meta-llama/Meta-Llama-3.1-8B-Instruct": "llama-3.1-8b"}.items():
        assert find_config(name) == rl.preset(shape)
    with pytest.raises(ValueError, match="'Qwen/Qwen3-9B' is no directory"):
        find_config("Qwen/Qwen3-9B")


def test_gemma_2_27b_scales_queries_by_its_own_number():
    assert rl.preset("gemma-2-27b").query_scale == 144**-0.5
    assert rl.preset("gemma-2-27b").head_dim == 128


def test_llama_3_scales_rope_by_eight_and_its_small_ones_by_thirty_two():
    factors = {name: rl.preset(name).layers[0].rope.factor for name in PRESETS if name.startswith("llama-3")}
    assert {name for name, factor in factors.items() if factor == 32.0} == {"llama-3.2-1b", "llama-3.2-3b"}
    assert set(factors.values()) == {8.0, 32.0}


def test_unknown_preset_is_refused_with_the_list():
    with pytest.raises(ValueError, match=r"preset 'llama-9' is not known; known: gemma-2-27b, gemma-2-9b, .*qwen3-8b"):
        rl.preset("llama-9")
