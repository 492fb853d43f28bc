"""The bundled model and its draft: the files that ship, what they predict, and the recipe that makes them."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import ridgeline as rl
from ridgeline.model.bundled import data, gradients, objective, recipe, train
from ridgeline.model.bundled.export import hf_config, hf_tensors
from ridgeline.model.layers import linear
from ridgeline.pallas_kernels.attention import causal_attention

BUNDLED = Path(data.__file__).parent
NAMES = ("story", "draft")
FILES = (
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
)
# In the manner of the books, but in none of them.
PASSAGE = (
    "Once upon a time there was a poor woodcutter who lived with his wife and his three children in a little house "
    "at the edge of the great forest. One morning, when the sun was shining brightly, the youngest said to his "
    'mother, "I will go out into the world and seek my fortune."\n\n"My dear child," said the mother, and she began '
    'to cry, "what will become of you?" But the boy was not afraid. He put a piece of bread in his pocket, and said '
    "good-bye to his brothers, and went on his way until he came to a river, and there he saw an old man sitting "
    "under a tree."
)


def read(name: str, file: str):
    return json.loads((BUNDLED / name / file).read_text())


def load(name: str) -> tuple[dict, rl.ModelConfig]:
    """A bundled model in float32, its tensors put back by the mapping that the export documents."""
    config = recipe.model_config(recipe.RECIPES[name], 2048, 1024).replace(dtype="float32")
    K, G, H, D = config.num_kv_heads, config.q_per_kv, config.head_dim, config.embed_dim
    with safe_open(BUNDLED / name / "model.safetensors", "flax") as file:
        tensors = {key: file.get_tensor(key).astype(jnp.float32) for key in file.keys()}  # noqa: SIM118

    def layer(index: int) -> dict:
        def part(key: str):
            return tensors[f"model.layers.{index}.{key}.weight"]

        q = part("self_attn.q_proj").reshape(K, G, H, D)
        k, v = (part(f"self_attn.{key}_proj").reshape(K, 1, H, D) for key in "kv")
        return {
            "qkv": jnp.concatenate([q, k, v], axis=1),
            "out": part("self_attn.o_proj").reshape(D, K, G, H),
            "gate_up": jnp.stack([part("mlp.gate_proj"), part("mlp.up_proj")]),
            "down": part("mlp.down_proj"),
            "attn_norm": part("input_layernorm"),
            "mlp_norm": part("post_attention_layernorm"),
        }

    params = {
        "embedding": tensors["model.embed_tokens.weight"],
        "layers": [layer(index) for index in range(config.num_layers)],
        "final_norm": tensors["model.norm.weight"],
    }
    return params, config


def nats_per_token(params: dict, config: rl.ModelConfig, ids: np.ndarray) -> float:
    logits = rl.forward(params, config, jnp.asarray(ids[None, :-1]))[0]
    return float(gradients.cross_entropy(logits[None], jnp.asarray(ids[None, 1:])).mean())


def test_files_ship_and_are_small():
    sizes = [(BUNDLED / name / file).stat().st_size for name in NAMES for file in FILES]
    assert sum(sizes) < 12 * 2**20
    assert not [f for name in NAMES for f in (BUNDLED / name).iterdir() if f.name not in FILES]


@pytest.mark.parametrize("name", NAMES)
def test_config_is_the_recipe(name):
    assert read(name, "config.json") == hf_config(recipe.model_config(recipe.RECIPES[name], 2048, 1024))


def test_the_draft_is_about_ten_times_smaller():
    story, draft = (rl.count_parameters(recipe.model_config(recipe.RECIPES[n], 2048, 1024)) for n in NAMES)
    assert 4e6 < story < 4.5e6
    assert 9 < story / draft < 11


@pytest.mark.parametrize("name", NAMES)
def test_tensors_have_llama_names_shapes_and_bfloat16(name):
    config = read(name, "config.json")
    D, F, H = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    Q, K = config["num_attention_heads"] * H, config["num_key_value_heads"] * H
    expected = {"model.embed_tokens.weight": [2048, D], "model.norm.weight": [D]}
    layer = {
        "self_attn.q_proj": [Q, D],
        "self_attn.k_proj": [K, D],
        "self_attn.v_proj": [K, D],
        "self_attn.o_proj": [D, Q],
        "mlp.gate_proj": [F, D],
        "mlp.up_proj": [F, D],
        "mlp.down_proj": [D, F],
        "input_layernorm": [D],
        "post_attention_layernorm": [D],
    }
    for index in range(config["num_hidden_layers"]):
        expected |= {f"model.layers.{index}.{key}.weight": shape for key, shape in layer.items()}
    with safe_open(BUNDLED / name / "model.safetensors", "numpy") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    assert {key: s.get_shape() for key, s in slices.items()} == expected
    assert {s.get_dtype() for s in slices.values()} == {"BF16"}


def test_export_undoes_import():
    params, config = load("draft")
    with safe_open(BUNDLED / "draft" / "model.safetensors", "flax") as file:
        for key, tensor in hf_tensors(params, config).items():
            np.testing.assert_array_equal(tensor, file.get_tensor(key), err_msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_round_trips_any_text(name):
    tokenizer = Tokenizer.from_file(str(BUNDLED / name / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 2048
    for text in (PASSAGE, "", " ", "\n\n\n", "naïve café “quoted” 日本語 🦊\x00\x7f\ttab\r\n", "  two  spaces  "):
        ids = tokenizer.encode(text).ids
        assert ids[0] == data.BEGIN_ID
        assert tokenizer.decode(ids) == text
    assert tokenizer.token_to_id(data.BEGIN) == data.BEGIN_ID
    assert tokenizer.token_to_id(data.END) == data.END_ID
    assert len(tokenizer.encode("the end.\n\nThe").tokens) == len(tokenizer.encode("the end. The").tokens) + 1


def test_both_models_share_one_tokenizer():
    first, second = ((BUNDLED / name / "tokenizer.json").read_bytes() for name in NAMES)
    assert first == second


def test_chat_template_tells_one_story():
    template = jinja2.Environment().from_string((BUNDLED / "story" / "chat_template.jinja").read_text())
    messages = [
        {"role": "user", "content": "Once upon a time there was a king."},
        {"role": "assistant", "content": " He had a daughter."},
        {"role": "user", "content": "She was kind."},
        {"role": "user", "content": "\n\nOne day"},
    ]
    told = template.render(messages=messages, bos_token=data.BEGIN, add_generation_prompt=True)
    story = "Once upon a time there was a king. He had a daughter. She was kind.\n\nOne day"
    assert told == data.BEGIN + story
    assert template.render(messages=[{"role": "user", "content": ""}] * 2, bos_token="") == ""


@pytest.mark.parametrize(("name", "nats"), [("story", 2.6), ("draft", 3.2)])
def test_model_knows_the_prose_of_fairy_tales(name, nats):
    params, config = load(name)
    tokenizer = Tokenizer.from_file(str(BUNDLED / name / "tokenizer.json"))
    ids = np.array(tokenizer.encode(PASSAGE).ids)
    shuffled = np.concatenate([ids[:1], np.random.default_rng(0).permutation(ids[1:])])
    chance = math.log(config.vocab_size)  # 7.6 nats a token
    assert nats_per_token(params, config, ids) < nats
    assert nats_per_token(params, config, shuffled) > chance - 0.5


@pytest.mark.parametrize("name", NAMES)
def test_card_states_the_best_of_the_curve(name):
    best = min(read(name, "training.json"), key=lambda entry: entry["held_out_nats_per_token"])
    card = (BUNDLED / name / "README.md").read_text()
    assert str(best["held_out_nats_per_token"]) in card
    assert str(best["held_out_bits_per_byte"]) in card


@pytest.mark.parametrize("name", NAMES)
def test_transformers_gives_the_same_logits(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params, config = load(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED / name)
    ids = tokenizer(PASSAGE).input_ids
    assert ids == Tokenizer.from_file(str(BUNDLED / name / "tokenizer.json")).encode(PASSAGE).ids
    model = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED / name, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].numpy()
    np.testing.assert_allclose(rl.forward(params, config, jnp.asarray([ids]))[0], expected, atol=2e-4)
    messages = [{"role": "user", "content": "Once upon a time"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == data.BEGIN + "Once upon a time"


# The recipe


def write_text(path: Path, books: int = 2) -> Path:
    """A made-up corpus whose words follow a simple grammar, in chapters and paragraphs."""
    rng = np.random.default_rng(0)
    nouns, verbs = ["fox", "king", "river", "castle", "girl"], ["saw", "found", "loved", "left"]

    def sentence() -> str:
        return f"The {rng.choice(nouns)} {rng.choice(verbs)} the {rng.choice(nouns)}. "

    def chapter(number: int) -> str:
        paragraphs = ["".join(sentence() for _ in range(rng.integers(2, 6))) for _ in range(20)]
        return "\n\n".join([f"CHAPTER {number}", *paragraphs])

    path.write_text(f"\n\n{data.BOOK_SEPARATOR}\n\n".join("\n\n".join(map(chapter, range(3))) for _ in range(books)))
    return path


def test_three_percent_of_a_book_is_held_out_and_nothing_is_lost():
    paragraphs = [f"Paragraph {i} is about nothing at all, but long enough. " * 4 for i in range(1000)]
    for index in range(0, 1000, 100):
        paragraphs[index] = f"CHAPTER {index}"
    documents, stretches = data.split_book(paragraphs)
    held_out = [p for text in stretches for p in text.split(data.PARAGRAPH_BREAK)]
    kept = [p for document in documents for p in document.text.split(data.PARAGRAPH_BREAK)]
    assert len(stretches) == 3
    assert 0.027 < sum(map(len, held_out)) / sum(map(len, paragraphs)) < 0.033
    assert sorted(held_out + kept) == sorted(paragraphs)
    assert sum(document.ends for document in documents) == 9  # one of ten ends lies in the middle stretch
    assert documents[0].text.startswith("CHAPTER 0")


@pytest.mark.parametrize(
    ("line", "is_heading"),
    [("CHAPTER II", True), ("3 - The Owl", True), ("IV. The Owl", True), ("THE FOX", True), ("I went.", False)],
)
def test_headings_part_documents(line, is_heading):
    prose = "There was once a fox that lived in a hole under the hill, and nobody knew of it but the owl."
    documents, _ = data.split_book([prose, line, prose, *[prose] * 100], share=0.001)
    assert (len(documents) == 2) == is_heading


def test_windows_follow_the_stream(tmp_path):
    book = data.read_books(write_text(tmp_path / "text"))[0]
    documents, stretches = data.split_book(book)
    tokenizer = data.train_tokenizer([d.text for d in documents], 300)
    stream = data.token_stream(tokenizer, documents)
    assert tokenizer.decode(list(stream)) == "".join(d.text for d in documents)
    batches = data.Epochs(stream, tokenizer, length=32, batch_size=2, seed=3)
    text = stream.tobytes()
    begun = 0
    for step in range(2 * batches.steps):
        tokens, targets = batches.batch(step)
        assert tokens.shape == targets.shape == ((2, 32) if step % batches.steps % 4 == 0 else (4, 16))
        np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
        assert all(row.tobytes() in text for row in targets)
        begun += int((tokens[:, 0] == data.BEGIN_ID).sum()) / len(tokens)
        np.testing.assert_array_equal(tokens, batches.batch(step)[0])
    assert 0.5 < begun / (2 * batches.steps) < 1.0

    windows = data.scoring_windows(tokenizer, stretches, 32)
    ids = [tokenizer.encode(text).ids for text in stretches]
    scored = windows.targets[windows.weights == 1]
    np.testing.assert_array_equal(scored, np.concatenate([i[1:] for i in ids]))
    continuing = windows.weights[:, 0] == 0
    assert windows.weights[continuing].argmax(axis=1).min() >= 16


@pytest.mark.parametrize(("inner", "outer"), [(8, (24,)), (24, (2, 4))])
def test_products_differentiate_like_plain_ones(inner, outer):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (5, inner), (*outer, inner), (5, *outer)
    x, w, g = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    dx, dw = jax.jit(jax.grad(lambda x, w: (gradients.product(x, w) * g).sum(), argnums=(0, 1)))(x, w)
    np.testing.assert_allclose(gradients.product(x, w), jnp.einsum("mi,...i->m...", x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, jnp.einsum("m...,...i->mi", g, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, jnp.einsum("m...,mi->...i", g, x), rtol=1e-5, atol=1e-5)


def test_fast_products_last_as_long_as_the_block():
    def uses_product(x, w):
        jaxpr = jax.make_jaxpr(lambda x, w: linear(x, w))(x, w)
        return "custom_vjp" in str(jaxpr)

    x, w = jnp.ones((3, 4)), jnp.ones((5, 4))
    with gradients.fast_products():
        assert uses_product(x, w)
    assert not uses_product(x, w)


@pytest.mark.parametrize("T", [5, 128, 300])
def test_attention_differentiates_like_the_reference(T):
    B, K, G, H = 2, 2, 3, 8
    q, k, v, g = (
        jax.random.normal(key, shape)
        for key, shape in zip(
            jax.random.split(jax.random.key(T), 4),
            [(B, T, K, G, H), (B, T, K, H), (B, T, K, H), (B, T, K, G, H)],
            strict=True,
        )
    )

    def loss(attend):
        return jax.jit(jax.value_and_grad(lambda q, k, v: (attend(q, k, v) * g).sum(), argnums=(0, 1, 2)))(q, k, v)

    value, grads = loss(gradients.attention)
    expected_value, expected = loss(lambda q, k, v: causal_attention(q, k, v, scale=H**-0.5))
    np.testing.assert_allclose(value, expected_value, rtol=1e-4)
    for actual, reference in zip(grads, expected, strict=True):
        np.testing.assert_allclose(actual, reference, atol=2e-5)


def test_cross_entropy_differentiates_like_log_softmax():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 11)) * 5
    targets = jnp.array([[0, 10, 3], [4, 4, 9]])
    weights = jnp.array([[1.0, 0.0, 2.0], [1.0, 1.0, 0.5]])

    def plain(logits):
        return -(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)[..., 0] * weights).sum()

    actual = jax.value_and_grad(lambda x: (gradients.cross_entropy(x, targets) * weights).sum())(logits)
    for a, b in zip(actual, jax.value_and_grad(plain)(logits), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_dropped_units_leave_the_expected_sum():
    config = recipe.model_config(recipe.Recipe(16, 1, 400, 1e-3, 0.25), 300, 32)
    params = recipe.initial_params(config, jax.random.key(0))
    down = params["layers"][0]["down"]
    ratio = objective.drop_units(params, jax.random.key(1), 0.25)["layers"][0]["down"] / down
    np.testing.assert_allclose(np.unique(np.round(ratio, 4)), [0.0, 1.3333])
    assert ((ratio > 0) == (ratio[:1] > 0)).all()
    assert 0.65 < (ratio[0] > 0).mean() < 0.85
    assert objective.drop_units(params, jax.random.key(1), 0.0) is params


TINY = {"vocab-size": 300, "length": 32, "batch-size": 2, "embed-dim": 16, "num-layers": 1, "ffn-dim": 16, "epochs": 3}


def command(text: Path, out: Path, *more: str) -> list[str]:
    tiny = [f"--{name}={value}" for name, value in TINY.items()]
    return ["--text", str(text), "--out", str(out), "--model", "story", "--eval-every", "7", *tiny, *more]


def checkpoint(out: Path) -> dict[str, np.ndarray]:
    with safe_open(out / "story.checkpoint.safetensors", "numpy") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors | {"progress": np.array(file.metadata()["progress"])}


def test_killed_training_resumes_to_the_same_weights(tmp_path, capsys):
    text, whole, killed = write_text(tmp_path / "text", books=3), tmp_path / "whole", tmp_path / "killed"
    train.main(command(text, whole))
    curve = json.loads((whole / "story" / "training.json").read_text())
    assert curve[-1]["held_out_nats_per_token"] < curve[0]["held_out_nats_per_token"] < math.log(300) + 0.5

    program = [sys.executable, "-m", "ridgeline.model.bundled.train", *command(text, killed)]
    with subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while not (killed / "story.checkpoint.safetensors").exists():
            assert process.poll() is None, "training ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    stopped_at = json.loads(str(checkpoint(killed)["progress"]))["step"]
    capsys.readouterr()
    train.main(command(text, killed))
    assert f"beginning at step {stopped_at}\n" in capsys.readouterr().out
    actual, expected = checkpoint(killed), checkpoint(whole)
    assert stopped_at < json.loads(str(actual["progress"]))["step"]
    assert actual.keys() == expected.keys()
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key], err_msg=key)
    for file in set(FILES) - {"README.md"}:
        assert (killed / "story" / file).read_bytes() == (whole / "story" / file).read_bytes(), file

    with pytest.raises(SystemExit, match=r"made with another .*seed"):
        train.main(command(text, killed, "--seed", "1"))
    with pytest.raises(SystemExit, match="--epochs can be changed only up to step"):
        train.main(command(text, killed, "--epochs", "9"))
    (killed / "story.checkpoint.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(SystemExit, match="is not a checkpoint of this program"):
        train.main(command(text, killed))


def test_a_shorter_run_goes_through_the_same_steps_until_its_rate_falls():
    chosen = dataclasses.replace(recipe.RECIPES["story"], warmup=4)
    schedules = [objective.make_optimizer(chosen, steps) for steps in (20, 40)]
    params = {"w": jnp.ones((2, 2))}
    steps = []
    for optimizer, plateau_end in schedules:
        state = optimizer.init(params)
        rates = []
        for _ in range(plateau_end + 2):
            updates, state = optimizer.update({"w": jnp.ones((2, 2))}, state, params)
            rates.append(float(updates["w"][0, 0]))
        steps.append(rates)
    limit = schedules[0][1] + 1
    assert steps[0][:limit] == steps[1][:limit]
    assert steps[0][limit] != steps[1][limit]


def test_both_models_are_trained_by_default(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(train, "train", lambda name, recipe, *rest: trained.append((name, recipe.num_layers)))
    text = write_text(tmp_path / "text")
    train.main(["--text", str(text), "--out", str(tmp_path), "--vocab-size=300", "--length=32", "--num-layers=1"])
    assert trained == [("story", 1), ("draft", 1)]


@pytest.mark.parametrize(
    ("content", "more", "message"),
    [
        (None, [], "does not exist"),
        (b"", [], "holds no words"),
        (b"\xff\xfe", [], "cannot be read as UTF-8"),
        (b"One line.", [], "too short to hold out"),
        (b"A short line of text.\n\n" * 100, [], "vocabulary of"),
    ],
)
def test_bad_text_is_refused_in_one_sentence(tmp_path, content, more, message):
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(SystemExit, match=message):
        train.main(command(tmp_path / "text", tmp_path / "out", *more))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs is 0; it must be positive"),
        (["--learning-rate", "nan"], "--learning-rate is nan"),
        (["--length", "7"], "--length is 7"),
        (["--vocab-size", "12"], "--vocab-size is 12"),
        (["--dropout", "1"], "--dropout is 1.0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--model", "novel"], "invalid choice"),
    ],
)
def test_bad_arguments_are_usage_errors(tmp_path, capsys, more, message):
    with pytest.raises(SystemExit) as error:
        train.main(command(tmp_path / "text", tmp_path / "out", *more))
    assert error.value.code == 2
    assert message in capsys.readouterr().err
