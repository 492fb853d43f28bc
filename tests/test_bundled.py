"""The bundled model and its draft: the files that ship, and what they predict."""

import json
import math

import jax.numpy as jnp
import jinja2
import numpy as np
import pytest
from safetensors import safe_open
from tokenizers import Tokenizer

import ridgeline as rl
from ridgeline.model import loading
from ridgeline.training import data, gradients, recipe
from ridgeline.training.export import hf_config

BUNDLED = loading.BUNDLED["bundled"].parent
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
    """A bundled model in float32, loaded as a user loads it."""
    model = rl.load_model({"story": "bundled", "draft": "bundled-draft"}[name], dtype="float32")
    return model.params, model.config


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
