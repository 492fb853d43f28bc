"""Every error that loading can meet, each on a checkpoint damaged on purpose."""

import json
import os
import re
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from backends import byte_level
from checkpoints import DOWN, EMBEDDING, LLAMA, assert_same, random_tensors, refused, save, save_shards, write
from ridgeline.model.checkpoint import CheckpointError
from ridgeline.model.loading import load_model

# --- errors: the directory ---


def test_no_such_directory(tmp_path):
    refused(tmp_path / "absent", r"no such directory: .*absent; give a directory .* bundled, bundled-draft")
    save(tmp_path)
    refused(tmp_path / "model.safetensors", r"model\.safetensors is a file; give the directory")


def test_unknown_dtype(tmp_path):
    with pytest.raises(ValueError, match="dtype 'int8' is not supported; supported: float32, bfloat16, float16"):
        load_model(tmp_path, dtype="int8")
    with pytest.raises(ValueError, match="dtype 'bf16' is not supported"):
        load_model(tmp_path, dtype="bf16")


def test_bad_config(tmp_path):
    refused(tmp_path, r"has no config\.json; give the directory")
    save(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    refused(tmp_path, r"config\.json is not JSON \(.*line 1 column 16.*fetch it again")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(tmp_path, r"config\.json is not UTF-8 \(byte 0 is 0xff\)")
    (tmp_path / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    refused(tmp_path, r"config\.json is not JSON \(Exceeds the limit")
    (tmp_path / "config.json").write_text("[1]")
    refused(tmp_path, r"config\.json holds a JSON list, expected an object")
    (tmp_path / "config.json").write_text('{"vocab_size": 3, "vocab_size": 4}')
    refused(tmp_path, r"config\.json is not JSON \(it names 'vocab_size' twice")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"architectures": ["BertModel"]}))
    refused(tmp_path, r"config\.json: .*BertModel.* supported: LlamaForCausalLM")
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}))
    refused(tmp_path, r"config\.json has no 'hidden_size'")


def test_no_weights(tmp_path):
    save(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    refused(tmp_path, r"neither model\.safetensors nor .*only weights\.safetensors; rename")
    (tmp_path / "weights.safetensors").unlink()
    refused(tmp_path, r"has no weights: .* only config\.json; fetch")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused_unopened(tmp_path, name):
    save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refused(tmp_path, re.escape(name), "runs whatever code it holds", "safe_serialization=True")


# --- errors: the index ---


def test_absent_shard(tmp_path):
    save_shards(tmp_path)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    refused(tmp_path, r"index\.json names shards that are not there: model-00002-of-00003\.safetensors; fetch")


def test_tensor_that_its_shard_lacks(tmp_path):
    index = save_shards(tmp_path)
    file = tmp_path / "model.safetensors.index.json"
    shard = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != shard)
    index["weight_map"]["model.norm.weight"] = other
    file.write_text(json.dumps(index))
    refused(tmp_path, rf"index\.json says that tensor 'model\.norm\.weight' is in {other}, which lacks it")
    index["weight_map"] |= {"model.norm.weight": shard, "ghost": shard, "model.visual": "gone.safetensors"}
    file.write_text(json.dumps(index))
    assert load_model(tmp_path).config.num_layers == 2  # nothing needs them


def test_tensor_in_two_shards(tmp_path):
    t = random_tensors(LLAMA)
    index = save_shards(tmp_path, tensors=t)
    shard = next(name for name in sorted(index["weight_map"].values()) if name != index["weight_map"][EMBEDDING])
    kept = {name: t[name] for name, file in index["weight_map"].items() if file == shard}
    write(tmp_path / shard, kept | {EMBEDDING: t[EMBEDDING] + 1})
    assert_same(load_model(tmp_path).params["embedding"], t[EMBEDDING])  # the index says which counts
    del index["weight_map"][EMBEDDING]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, rf"'{EMBEDDING}' is in both .*00001.* and .*{shard}, and the index does not say .*remove it")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_index_without_a_weight_map(tmp_path, text):
    save_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r"index\.json.* '?weight_map.* expected an object, each field a text")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    refused(tmp_path, r"index\.json: weight_map\.a is 1, expected a text")


def test_index_that_leaves_the_directory(tmp_path):
    index = save_shards(tmp_path)
    index["weight_map"]["x"] = "../other/model.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, r"names the shard '\.\./other/model\.safetensors'; a shard must lie")


# --- errors: tensors against the configuration ---


def test_missing_tensors(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors={name: v for name, v in t.items() if name != DOWN})
    refused(tmp_path, rf"model\.safetensors lacks 1 of the 29 tensors .*\(2 layers of family 'llama'\): {DOWN}; ")
    save(tmp_path, tensors={name: v for name, v in t.items() if ".layers.1." not in name})
    refused(tmp_path, r"lacks 13 of the 29 tensors", r"and 8 more; the checkpoint is incomplete or config\.json")
    save(tmp_path, tensors={name.replace(".layers", ".h"): v for name, v in t.items()})
    refused(tmp_path, r"it holds model\.h\.0\.self_attn\.o_proj\.weight, .* instead")
    save(tmp_path, tensors={name: v for name, v in t.items() if name != "lm_head.weight"})
    refused(tmp_path, r"lacks 1 of .*: lm_head\.weight; .*if embeddings are tied, set tie_word_embeddings to true")


def test_missing_tensors_of_shards_name_the_directory(tmp_path):
    t = random_tensors(LLAMA)
    save_shards(tmp_path, tensors={name: v for name, v in t.items() if name != DOWN})
    assert refused(tmp_path).startswith(f"{tmp_path} lacks 1 of")


def test_extra_tensors(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, LLAMA | {"attention_bias": False}, t)
    refused(
        tmp_path,
        r"model\.safetensors: 8 tensors that nothing .*\.0\.self_attn\.q_proj\.bias, .* 3 more; .* bias settings",
    )


def test_config_with_fewer_layers(tmp_path):
    save(tmp_path, LLAMA | {"num_hidden_layers": 1}, random_tensors(LLAMA))
    refused(tmp_path, r"\(1 layers of family 'llama'\): model\.layers\.1\..* and 8 more; check num_hidden_layers")


def test_misshapen_tensor(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t | {DOWN: np.ascontiguousarray(t[DOWN].T)})
    refused(tmp_path, rf"model\.safetensors: tensor '{DOWN}' has shape \[20, 24\], expected \[24, 20\] by config\.json")


def test_config_with_another_vocabulary(tmp_path):
    save(tmp_path, LLAMA | {"vocab_size": 31}, random_tensors(LLAMA))
    refused(tmp_path, rf"'{EMBEDDING}' has shape \[29, 24\], expected \[31, 24\] by config\.json \(vocab_size 31, ")


@pytest.mark.parametrize(
    ("dtype", "pattern"),
    [
        ("int8", r"has dtype I8, expected one of F32, BF16, F16; weights are quantized, and config\.json has no"),
        ("float64", r"has dtype F64, expected one of F32, BF16, F16; save the model again in float32"),
    ],
)
def test_unsupported_dtype(tmp_path, dtype, pattern):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t | {DOWN: t[DOWN].astype(dtype)})
    refused(tmp_path, rf"model\.safetensors: tensor '{DOWN}' {pattern}")


def test_fp8_is_named(tmp_path):
    t = random_tensors(LLAMA)
    save(tmp_path, tensors=t | {DOWN: t[DOWN].astype("uint8")}, edit=lambda h: h[DOWN].update(dtype="F8_E4M3"))
    refused(tmp_path, rf"'{DOWN}' has dtype F8_E4M3, expected one of .*load the unquantized checkpoint")


def test_packed_quantized_tensors_are_named(tmp_path):
    """GPTQ and AWQ store another tensor in place of the weight: what it is says more than what is missing."""
    t = random_tensors(LLAMA)
    packed = t.pop(DOWN).astype("uint8")
    save(tmp_path, tensors=t | {"model.layers.1.mlp.down_proj.qweight": packed})
    refused(tmp_path, r"'model\.layers\.1\.mlp\.down_proj\.qweight' has dtype U8, .*load the unquantized checkpoint")


def test_values_beyond_float16(tmp_path):
    t = random_tensors(LLAMA)
    t[DOWN][0, 0] = 1e6
    save(tmp_path, tensors=t)
    assert float(load_model(tmp_path).params["layers"][1]["down"][0, 0]) == 1e6
    with pytest.raises(CheckpointError, match=rf"'{DOWN}' holds values beyond float16's 65504; load it with dtype bfl"):
        load_model(tmp_path, dtype="float16")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(tmp_path, dtype, value):
    t = random_tensors(LLAMA, dtype)
    t[DOWN][3, 5] = value
    save(tmp_path, tensors=t)
    refused(tmp_path, rf"model\.safetensors: tensor '{DOWN}' holds NaN or infinite values; .*check_finite=False")
    loaded = load_model(tmp_path, check_finite=False).params["layers"][1]["down"]
    assert jnp.argwhere(~jnp.isfinite(loaded)).tolist() == [[3, 5]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_largest_weights_are_finite(tmp_path, dtype):
    t, largest = random_tensors(LLAMA, dtype), jnp.finfo(dtype).max
    t[DOWN][3, :2] = largest, -largest
    save(tmp_path, tensors=t)
    assert_same(load_model(tmp_path, dtype=dtype).params["layers"][1]["down"], t[DOWN])
    if dtype == "float32":
        with pytest.raises(CheckpointError, match="holds values beyond bfloat16; load it with dtype float32"):
            load_model(tmp_path, dtype="bfloat16")


# --- errors: files that are none ---


def as_directory(file):
    file.mkdir()


def as_device(file):
    file.symlink_to("/dev/zero")


def as_endless_file(file):
    with file.open("wb") as sparse:
        sparse.truncate(2**41)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"]
)
@pytest.mark.parametrize(
    ("make", "pattern"),
    [
        (as_directory, "is a directory, where a file belongs"),
        (os.mkfifo, "is a pipe, where a file belongs"),
        (as_device, "is a device, where a file belongs"),
        (lambda file: file.symlink_to("nowhere"), "is a link to nowhere, which is not there"),
        (lambda file: file.symlink_to(file), "cannot be read: Too many levels of symbolic links"),
        (as_endless_file, "has 2,199,023,255,552 bytes, more than the"),
        (lambda file: file.write_bytes(b'{"a": "\xe9"}'), r"is not UTF-8 \(byte 7 is 0xe9\)|is no tokenizer"),
    ],
)
def test_what_is_no_file(tmp_path, name, make, pattern):
    save(tmp_path, LLAMA | {"vocab_size": 400})
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / name).unlink(missing_ok=True)
    make(tmp_path / name)
    refused(tmp_path, rf"/{re.escape(name)} ({pattern})")


@pytest.mark.parametrize("name", ["model.safetensors", "model-00002-of-00003.safetensors"])
def test_weights_that_are_no_file(tmp_path, name):
    save_shards(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    refused(tmp_path, rf"{name} is a pipe, where a file belongs")


@pytest.mark.parametrize("shard", ["x" * 300, "a\x00b"])
def test_shards_of_impossible_names(tmp_path, shard):
    index = save_shards(tmp_path)
    index["weight_map"][DOWN] = shard
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(tmp_path, "index.json names shards that are not there")


def test_a_path_that_is_too_long():
    with pytest.raises(ValueError, match=r"load_model: path is 'x+\.\.\.x+'; no file can have that name"):
        load_model("x" * 5000)


# --- errors: damaged files ---


def test_truncated_file(tmp_path):
    save(tmp_path, cut=100)
    refused(tmp_path, r"model\.safetensors is truncated: tensor '.*' ends at byte \d+, the file at byte \d+; fetch it")
    save(tmp_path)
    for size, pattern in ((0, "has 0 bytes, too few"), (5, "has 5 bytes"), (900, "announces a header of .* only 892")):
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[:size])
        refused(tmp_path, pattern)
        (tmp_path / "model.safetensors").write_bytes(data)


def test_trailing_bytes(tmp_path):
    save(tmp_path, tail=b"12345678")
    refused(tmp_path, r"has 8 bytes after tensor '.*', the last one it describes")


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"PK\x03\x04 a zip archive, such as torch writes", r"announces a header of \d+ bytes, but only \d+ follow"),
        (struct.pack("<Q", 5) + b"{oops", r"the header of .*model\.safetensors is not JSON"),
        (struct.pack("<Q", 2) + b"[]", r"the header of .*model\.safetensors holds a JSON list, expected an object"),
        (struct.pack("<Q", 15) + b'{"a":1,"a":"2"}', r"the header of .* is not JSON \(it names 'a' twice"),
        (struct.pack("<Q", 7) + b'{"a":1}', r"describes tensor 'a' as 1, expected a dtype, a shape"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
    ],
)
def test_wrong_header(tmp_path, data, pattern):
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    refused(tmp_path, pattern)


def shifted(by: int):
    def edit(header):
        header[DOWN]["data_offsets"] = [offset + by for offset in header[DOWN]["data_offsets"]]

    return edit


@pytest.mark.parametrize(
    ("edit", "pattern"),
    [
        (shifted(-8), rf"tensor '{DOWN}' starts at byte \d+ and overlaps tensor '.*', which ends at byte"),
        (shifted(8), rf"tensor '{DOWN}' starts at byte \d+ and leaves a gap after tensor"),
        (shifted(10**9), "leaves a gap after"),
        (shifted(-(10**9)), rf"describes tensor '{DOWN}' as .* ascending data_offsets"),
        (lambda h: h[DOWN].update(data_offsets=[8, 4]), rf"describes tensor '{DOWN}' as .* ascending data_offsets"),
        (lambda h: h[DOWN].update(shape=[1] * 99), rf"describes tensor '{DOWN}' as .* of at most 8 whole numbers"),
        (lambda h: h[DOWN].update(data_offsets=[False, True]), rf"describes tensor '{DOWN}'"),
        (lambda h: h[DOWN].update(shape=[-1, 20]), rf"describes tensor '{DOWN}'"),
        (
            lambda h: h[DOWN].update(shape=[24, 19]),
            rf"gives tensor '{DOWN}' 1920 bytes, expected 1824 of dtype F32 and shape \[24, 19\]",
        ),
        (lambda h: h[DOWN].update(dtype="BF16"), rf"gives tensor '{DOWN}' 1920 bytes, expected 960 of dtype BF16"),
    ],
)
def test_wrong_offsets(tmp_path, edit, pattern):
    save(tmp_path, edit=edit)
    refused(tmp_path, r"model\.safetensors", pattern)
