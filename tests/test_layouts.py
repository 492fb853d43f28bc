"""Checkpoints as they are published: prefixes, parts of larger models, indices, and directories of another kind."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import EMBEDDING, FIXTURES, LLAMA, assert_same, random_tensors, refused, save, save_shards, write
from ridgeline.model.checkpoint import Checkpoint
from ridgeline.model.loading import convert_model, load_model

TIED = LLAMA | {"tie_word_embeddings": True}
HEAD = "lm_head.weight"


def fixture(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    checkpoint = Checkpoint(FIXTURES / name)
    tensors = {tensor: checkpoint.read(tensor) for tensor in checkpoint.tensors}
    return json.loads((FIXTURES / name / "config.json").read_text()), tensors


def expected_logits(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    expected = np.load(sorted((FIXTURES / name).glob("expected*.npz"))[0])
    return np.concatenate([expected["prompts"], expected["greedy"]], axis=1), expected["positions"], expected["logits"]


def assert_logits(model: rl.Model, name: str) -> None:
    tokens, positions, logits = expected_logits(name)
    ours = rl.forward(model.params, model.config, jnp.asarray(tokens))[:, positions]
    np.testing.assert_allclose(ours, logits, atol=2e-4, rtol=0)


# --- prefixes ---


@pytest.mark.parametrize(
    ("decoder", "head"),
    [
        ("", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("base_model.model.model.", "base_model.model.lm_head."),
        ("_orig_mod.model.", "_orig_mod.lm_head."),
    ],
)
@pytest.mark.parametrize("hf", [LLAMA, TIED], ids=["head", "tied"])
def test_prefixes_are_found(tmp_path, decoder, head, hf):
    tensors = random_tensors(hf)
    renamed = {
        name.replace("lm_head.", head, 1) if name == HEAD else decoder + name.removeprefix("model."): tensor
        for name, tensor in tensors.items()
    }
    (tmp_path / "plain").mkdir()
    save(tmp_path / "plain", hf, tensors)
    (tmp_path / "renamed").mkdir()
    save(tmp_path / "renamed", hf, renamed)
    assert_same(load_model(tmp_path / "renamed").params, load_model(tmp_path / "plain").params)


def test_bare_decoders(tmp_path):
    """As embedding models are published: no head; where it is not tied, its lack is said."""
    tensors = {name.removeprefix("model."): tensor for name, tensor in random_tensors(TIED).items()}
    save(tmp_path, TIED | {"architectures": ["LlamaModel"]}, tensors)
    np.testing.assert_array_equal(load_model(tmp_path).params["embedding"], tensors["embed_tokens.weight"])
    save(tmp_path, LLAMA | {"architectures": ["LlamaModel"]}, tensors)
    refused(tmp_path, r"lacks 1 of .*: lm_head\.weight; .* if embeddings are tied, set tie_word_embeddings to true")


def test_adapters_that_were_not_merged(tmp_path):
    tensors = {f"base_model.model.{name}": tensor for name, tensor in random_tensors(LLAMA).items()}
    query = "base_model.model.model.layers.0.self_attn.q_proj."
    tensors[f"{query}base_layer.weight"] = tensors.pop(f"{query}weight")
    tensors[f"{query}lora_A.default.weight"] = np.zeros((4, 24), "float32")
    save(tmp_path, LLAMA, tensors)
    refused(tmp_path, r"lacks 1 of .*; it holds adapters \(LoRA\) beside the weights; merge them with peft")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.rotary_emb.cos_cached",
        "model.layers.1.self_attn.rotary_emb.long_inv_freq",
        "model.rotary_emb_local.original_inv_freq",
        "rope.freqs",
        "model.layers.0.self_attn.rotary_pos_emb.sin",
        "freqs_cis",
    ],
)
def test_buffers_of_rotary_caches_are_passed_over(tmp_path, name, recwarn):
    save(tmp_path, tensors=random_tensors(LLAMA) | {name: np.ones(2, "float64")})
    assert load_model(tmp_path).config.num_layers == 2
    assert not recwarn.list


# --- the text part of multimodal models ---


def multimodal(hf: dict, architecture: str, **top) -> dict:
    text = {key: value for key, value in hf.items() if key not in ("architectures", "torch_dtype", "eos_token_id")}
    kept = {key: hf[key] for key in ("torch_dtype", "eos_token_id") if key in hf}
    return {"architectures": [architecture], "text_config": text, "vision_config": {"hidden_size": 8}, **kept, **top}


@pytest.mark.parametrize("decoder", ["language_model.model.", "model.language_model."])
def test_gemma_3_with_vision(tmp_path, decoder):
    hf, tensors = fixture("gemma3")
    renamed = {decoder + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    renamed |= {
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight": np.ones((4, 4), "float32"),
        "multi_modal_projector.mm_input_projection_weight": np.ones((4, 4), "float64"),
    }
    text = hf | {"model_type": "gemma3_text"}
    save(tmp_path, multimodal(text, "Gemma3ForConditionalGeneration", eos_token_id=[1, 106]), renamed)
    pattern = "the text part alone is loaded, without the 2 tensors of multi_modal_projector, vision_tower"
    with pytest.warns(UserWarning, match=pattern):
        model = load_model(tmp_path)
    assert model.generation.eos_token_ids == (1, 106)
    assert_logits(model, "gemma3")
    with pytest.warns(UserWarning, match="text part alone"):
        again = load_model(convert_model(tmp_path, tmp_path / "out"))
    assert again.config == model.config
    assert_same(again.params, model.params)


@pytest.mark.parametrize("stated", [{}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}])
def test_mistral_3(tmp_path, stated):
    """Whether embeddings are tied, its files say differently: the stored head tells."""
    hf, tensors = fixture("mistral_full")
    renamed = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    renamed["vision_tower.patch_conv.weight"] = np.ones((2, 2), "float32")
    save(tmp_path, multimodal(hf | {"model_type": "mistral"}, "Mistral3ForConditionalGeneration", **stated), renamed)
    with pytest.warns(UserWarning, match="without the 1 tensors of vision_tower"):
        assert_logits(load_model(tmp_path), "mistral_full")


def test_what_a_text_model_does_not_call_for_is_not_passed_over(tmp_path):
    save(tmp_path, tensors=random_tensors(LLAMA) | {"vision_tower.weight": np.ones((2, 2), "float32")})
    refused(tmp_path, "1 tensors that nothing in config.json calls for .*: vision_tower.weight")
    unlike = multimodal(LLAMA | {"model_type": "qwen2_vl_text"}, "LlavaForConditionalGeneration")
    save(tmp_path, unlike, random_tensors(LLAMA))
    refused(tmp_path, "model_type 'qwen2_vl_text' is not supported")


@pytest.mark.parametrize(
    ("architecture", "text", "vision"),
    [
        ("Gemma3", "gemma3_text", "siglip_vision_model"),
        ("Mistral3", "mistral", "pixtral"),
        ("Llava", "llama", "clip_vision_model"),
        ("LlavaNext", "mistral", "clip_vision_model"),
        ("InternVL", "qwen2", "internvl_vision"),
    ],
)
def test_text_parts_give_the_logits_of_transformers(tmp_path, architecture, text, vision):
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    sizes = {key: LLAMA[key] for key in ("vocab_size", "num_hidden_layers", "max_position_embeddings", "head_dim")}
    sizes |= {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 6, "num_key_value_heads": 3}
    image = [28, 28] if vision == "internvl_vision" else 28
    patch = [14, 14] if vision == "internvl_vision" else 14
    eyes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    eyes |= {"image_size": image, "patch_size": patch, "projection_dim": 8}
    config = getattr(transformers, f"{architecture}Config")(
        text_config={"model_type": text, "pad_token_id": 0, **sizes}, vision_config={"model_type": vision, **eyes}
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{architecture}ForConditionalGeneration")(config).eval()
    theirs.save_pretrained(tmp_path)
    tokens = np.arange(12).reshape(2, 6)
    expected = theirs(input_ids=torch.tensor(tokens)).logits.detach().numpy()
    with pytest.warns(UserWarning, match="text part alone"):
        model = load_model(tmp_path)
    np.testing.assert_allclose(rl.forward(model.params, model.config, tokens), expected, atol=1e-5, rtol=0)


# --- indices ---


@pytest.mark.parametrize("equal", [True, False])
def test_the_index_says_which_copy_counts(tmp_path, equal):
    tensors = random_tensors(LLAMA)
    index = save_shards(tmp_path, tensors=tensors)
    overlay = tensors[EMBEDDING] + (0 if equal else 1)
    write(tmp_path / "model-overlay.safetensors", {EMBEDDING: overlay})
    index["weight_map"][EMBEDDING] = "model-overlay.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(load_model(tmp_path).params["embedding"], overlay)


def test_an_index_may_name_more_than_there_is(tmp_path):
    index = save_shards(tmp_path, TIED, random_tensors(TIED))
    file = tmp_path / "model.safetensors.index.json"
    index["weight_map"] |= {HEAD: "model-00001-of-00003.safetensors", "vision.weight": "model-00004.safetensors"}
    file.write_text(json.dumps(index))
    assert load_model(tmp_path).config.tie_embeddings
    index["weight_map"] |= {"model.norm.weight": "model-00004.safetensors"}
    file.write_text(json.dumps(index))
    refused(tmp_path, r"index\.json names shards that are not there: model-00004\.safetensors; fetch")


# --- directories of another kind ---


def test_the_layout_of_mistral_and_of_meta(tmp_path):
    for name in ("params.json", "tekken.json"):
        (tmp_path / name).write_text("{}")
    write(tmp_path / "consolidated.safetensors", {"tok_embeddings.weight": np.ones((2, 2), "float32")})
    pattern = r"a model in Mistral's own layout .*; take the Hugging Face files of the same repository"
    refused(tmp_path, pattern)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "tekken.json").unlink()
    refused(tmp_path, pattern)
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "consolidated.00.pth")
    refused(tmp_path, "a model in Meta's own layout")


def test_an_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    write(tmp_path / "adapter_model.safetensors", {"x": np.ones(2, "float32")})
    refused(tmp_path, r"is an adapter \(LoRA\) of the model 'org/base', .*merge_and_unload")
    save(tmp_path)
    with pytest.warns(UserWarning, match=r"also holds an adapter \(LoRA\) of the model 'org/base', which is not"):
        load_model(tmp_path)


def test_the_cache_of_the_hub(tmp_path):
    cache = tmp_path / "models--org--name"
    (cache / "snapshots" / "abc").mkdir(parents=True)
    save(cache / "snapshots" / "abc")
    assert load_model(cache).directory == cache / "snapshots" / "abc"
    (cache / "snapshots" / "def").mkdir()
    refused(cache, "whose refs/main names no snapshot; give one of its snapshots: abc, def")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("../../elsewhere")
    refused(cache, r"names '\.\./\.\./elsewhere'; give one of its snapshots")
    (cache / "refs" / "main").write_text("abc\n")
    assert (load_model(cache).directory.name, load_model(cache).name) == ("abc", "name")
    refused(tmp_path, "is a cache of several repositories; give the directory of one: models--org--name")


@pytest.mark.parametrize(
    ("name", "form"),
    [("model-Q4_K_M.gguf", r"llama\.cpp's GGUF"), ("model.onnx", "ONNX"), ("tf_model.h5", "TensorFlow's")],
)
def test_files_of_other_programs(tmp_path, name, form):
    (tmp_path / name).write_bytes(b"GGUF")
    refused(tmp_path, rf"holds its weights in {name}, {form} form, which is not read; load the safetensors checkpoint")
    refused(tmp_path / name, rf"is a file in {form} form, which is not read")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    refused(tmp_path, rf"holds its weights in {name}, {form} form")


def test_a_directory_of_checkpoints(tmp_path):
    (tmp_path / "checkpoint-500").mkdir()
    save(tmp_path / "checkpoint-500")
    refused(tmp_path, r"has no config\.json; those inside it, checkpoint-500, do: give one of them")
    shutil.rmtree(tmp_path / "checkpoint-500")
    refused(tmp_path, r"has no config\.json; give the directory that holds")
