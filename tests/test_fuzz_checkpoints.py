"""Damaged checkpoints: each loads and makes finite logits, or is refused by an error that names the file.

`--mutations 2000 --mutation-seed 1 -s` tries more, and prints a table of the outcomes.
"""

import json
import os
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import ridgeline as rl
from backends import byte_level
from checkpoints import LLAMA, PHI3, random_tensors, save_shards
from fuzzing import Outcomes, mutated
from quantized_checkpoints import write_pair
from ridgeline.model.checkpoint import CheckpointError
from ridgeline.model.generation import DECLARED
from ridgeline.model.hf.declared import CONFIG, QUANTIZATION, ROPE
from ridgeline.model.loading import load_model

VOCABULARY = 420
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 3.0]}
GEMMA = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 4,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
}
CONFIGS = {
    "llama": LLAMA | {"rope_scaling": YARN},
    "phi3": PHI3 | {"rope_scaling": LONGROPE, "original_max_position_embeddings": 32},
    "gemma3": LLAMA | GEMMA | {"attention_bias": False, "tie_word_embeddings": True, "hidden_activation": "gelu"},
    "qwen2": LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "max_window_layers": 1},
}
QUANTIZED = ("gptq", "int4 in act order", "fp8 in blocks")
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content | trim }}</s>{% endfor %}"
TEMPLATES = (
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ messages.__class__ }}",
    "{% for %}",
    "{{ nothing.at_all }}",
)

Mutation = Callable[[Path, random.Random], str]
"""Changes a directory, and says what it did."""


def write_sources(directory: Path) -> list[Path]:
    """Whole checkpoints of several kinds, with all of the files that are read."""
    sources = []
    for name, hf in CONFIGS.items():
        sources.append(directory / name)
        sources[-1].mkdir()
        hf = hf | {"vocab_size": VOCABULARY}
        save_shards(sources[-1], hf, random_tensors(hf))
    for name in QUANTIZED:
        pair = directory / name.replace(" ", "-")
        pair.mkdir()
        sources.append(write_pair(pair, name, vocab_size=VOCABULARY)[0])
    files = {
        "generation_config.json": {"eos_token_id": [1], "top_p": 0.9, "bad_words_ids": [[5]], "stop_strings": ["x"]},
        "tokenizer_config.json": {
            "eos_token": {"content": "</s>", "lstrip": False},
            "bos_token": "<s>",
            "add_bos_token": True,
            "added_tokens_decoder": {"402": {"content": "<new>", "special": True}},
            "extra_special_tokens": ["<more>"],
        },
        "special_tokens_map.json": {"pad_token": "<pad>"},
        "added_tokens.json": {"<other>": 403},
    }
    for source in sources:
        byte_level().save(str(source / "tokenizer.json"))
        (source / "chat_template.jinja").write_text(TEMPLATE)
        for name, content in files.items():
            (source / name).write_text(json.dumps(content))
    (sources[0] / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')  # the older files count beside it
    return sources


# --- mutations ---


def json_file(name: str, *fields: str) -> Mutation:
    def mutate(directory: Path, rng: random.Random) -> str:
        file = directory / name
        content, done = mutated(json.loads(file.read_text()) if file.exists() else {}, rng, fields)
        file.write_text(json.dumps(content))
        return f"{name}: {done}"

    return mutate


def header(directory: Path, rng: random.Random) -> str:
    file = rng.choice(sorted(directory.glob("model*.safetensors")))
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    content, done = mutated(json.loads(data[8 : 8 + size]), rng, ("__metadata__", "x", "model.norm.weight"))
    text = json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return f"header of {file.name}: {done}"


def weights(directory: Path, rng: random.Random) -> str:
    """A value that is not finite; other bits make other weights, which nothing can tell from those that were meant."""
    file = rng.choice(sorted(directory.glob("model*.safetensors")))
    data = bytearray(file.read_bytes())
    start = 8 + struct.unpack("<Q", data[:8])[0]
    entries = {name: e for name, e in json.loads(data[8:start]).items() if e.get("dtype") in ("F32", "BF16", "F16")}
    name = rng.choice(sorted(entries))
    dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}[entries[name]["dtype"]]
    first, last = entries[name]["data_offsets"]
    values = np.frombuffer(data, jnp.dtype(dtype), (last - first) // jnp.dtype(dtype).itemsize, start + first)
    value = rng.choice([np.nan, np.inf, -np.inf])
    values[rng.randrange(values.size)] = value
    file.write_bytes(data)
    return f"{file.name}: {value} in {name}"


def some_bytes(directory: Path, rng: random.Random) -> str:
    """Bytes of a small file or of a header changed, put in, or cut off."""
    file = rng.choice(sorted(path for path in directory.iterdir() if path.name != "tokenizer.json"))
    data = bytearray(file.read_bytes())
    place = rng.randrange(min(len(data), 600)) if data else 0
    how = rng.choice(["flip", "insert", "cut", "zero", "double"])
    match how:
        case "flip":
            data[place] ^= 1 << rng.randrange(8)
        case "insert":
            data[place:place] = rng.randbytes(rng.randrange(1, 9))
        case "cut":
            del data[place:]
        case "zero":
            data[place : place + 8] = bytes(8)
        case "double":
            data += data[:place]
    file.write_bytes(data)
    return f"{file.name}: {how} at {place}"


def other_thing(directory: Path, rng: random.Random) -> str:
    """Something else where a file belongs, or one too many."""
    names = sorted(path.name for path in directory.iterdir())
    file = directory / rng.choice(
        [*names, "quantize_config.json", "ridgeline.json", "adapter_config.json", "vocab.json"]
    )
    file.unlink(missing_ok=True)
    how = rng.choice(["absent", "directory", "pipe", "link to nothing", "link to itself", "device", "endless", "empty"])
    match how:
        case "directory":
            file.mkdir()
        case "pipe":
            os.mkfifo(file)
        case "link to nothing":
            file.symlink_to("nothing")
        case "link to itself":
            file.symlink_to(file)
        case "device":
            file.symlink_to("/dev/zero")
        case "endless":
            with file.open("wb") as sparse:
                sparse.truncate(2**41)
        case "empty":
            file.touch()
    return f"{file.name}: {how}"


def template(directory: Path, rng: random.Random) -> str:
    file = directory / "chat_template.jinja"
    text = rng.choice(TEMPLATES)
    if rng.random() < 0.5:
        place = rng.randrange(len(TEMPLATE))
        text = (
            TEMPLATE[:place] + rng.choice(["", "{%", "}}", "{{", "|", "(", "[0]", " ~ 5 ** 9"]) + TEMPLATE[place + 2 :]
        )
    file.write_text(text)
    return f"{file.name}: {text[:60]!r}"


KINDS: dict[str, Mutation] = {
    "config.json": json_file("config.json", *CONFIG),
    "its rope_scaling": lambda directory, rng: _inner(directory, rng, "rope_scaling", ROPE),
    "its quantization_config": lambda directory, rng: _inner(directory, rng, "quantization_config", QUANTIZATION),
    "generation_config.json": json_file("generation_config.json", *DECLARED),
    "tokenizer_config.json": json_file("tokenizer_config.json", "chat_template", "split_special_tokens", "pad_token"),
    "older files of tokens": json_file("special_tokens_map.json", "eos_token"),
    "tokenizer.json": json_file("tokenizer.json"),
    "the index": json_file("model.safetensors.index.json", "weight_map"),
    "a header": header,
    "weights": weights,
    "bytes": some_bytes,
    "what is no file": other_thing,
    "the chat template": template,
}


def _inner(directory: Path, rng: random.Random, key: str, fields: dict) -> str:
    file = directory / "config.json"
    content = json.loads(file.read_text())
    content[key], done = mutated(content.get(key) or {"type": "yarn", "factor": 2.0}, rng, (*fields,))
    file.write_text(json.dumps(content))
    return f"{file.name}: {key} {done}"


# --- the program ---


def use(directory: Path) -> str:
    """Load a checkpoint and use all of it."""
    model = load_model(directory)
    tokens = jnp.arange(6)[None] % model.config.vocab_size
    if not bool(jnp.isfinite(rl.forward(model.params, model.config, tokens)).all()):
        raise ArithmeticError("logits that are not finite")
    if model.tokenizer is not None:
        model.tokenizer.decode(model.tokenizer.encode("hello <new> fox"))
        if "default" in model.tokenizer.chat_templates:
            try:
                model.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
            except ValueError as error:
                if "chat template" not in str(error):
                    raise ArithmeticError(f"an error of no template: {error}") from error
                return "template refused"
    return "loaded"


def test_damaged_checkpoints(tmp_path, request, monkeypatch):
    monkeypatch.setattr("ridgeline.model.tokenizer.sandbox.SECONDS", 0.1)
    sources = write_sources(tmp_path)
    outcomes = Outcomes(CheckpointError)
    directory = tmp_path / "damaged"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in sources:
            assert use(source) == "loaded"
        for number in range(request.config.getoption("mutations")):
            rng = random.Random(f"{request.config.getoption('mutation_seed')}-{number}")
            source, kind = rng.choice(sources), rng.choice([*KINDS])
            shutil.copytree(source, directory)
            names = {path.name for path in directory.iterdir()}
            what = f"mutation {number}, {source.name}, {KINDS[kind](directory, rng)}"
            names |= {path.name for path in directory.iterdir()} | {str(directory)}
            outcomes.of(kind, what, lambda: use(directory), lambda text: any(name in text for name in names))  # noqa: B023
            shutil.rmtree(directory)
    print(f"\n{outcomes.table()}")
    assert not outcomes.failures, "\n".join(outcomes.failures)
