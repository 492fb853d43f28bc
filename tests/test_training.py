"""The recipe of the bundled models: data, derivatives, and training that is killed and goes on."""

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
import numpy as np
import pytest
from safetensors import safe_open

from ridgeline.pallas_kernels.attention import causal_attention
from ridgeline.pallas_kernels.pages import AttentionOptions
from ridgeline.training import data, gradients, objective, recipe, train


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
    axes = (None,) * w.ndim
    dx, dw = jax.jit(jax.grad(lambda x, w: (gradients.product(x, w, axes) * g).sum(), argnums=(0, 1)))(x, w)
    np.testing.assert_allclose(gradients.product(x, w, axes), jnp.einsum("mi,...i->m...", x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, jnp.einsum("m...,...i->mi", g, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, jnp.einsum("m...,mi->...i", g, x), rtol=1e-5, atol=1e-5)


def test_every_weight_product_of_the_loss_is_the_one_with_derivatives_of_its_own():
    config = recipe.model_config(recipe.Recipe(16, 2, 400, 1e-3, 0.25), 300, 32)
    params, tokens = recipe.initial_params(config, jax.random.key(0)), jnp.zeros((2, 8), jnp.int32)
    program = jax.make_jaxpr(lambda params: objective.losses(params, config, tokens, tokens))(params)
    by_hand = [equation for equation in program.eqns if equation.primitive.name.startswith("custom_vjp")]
    assert len(by_hand) == 2 * (4 + 1) + 1 + 1  # four products and attention a layer, the output, the cross entropy


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
    expected_value, expected = loss(lambda q, k, v: causal_attention(q, k, v, AttentionOptions(H**-0.5)))
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

    program = [sys.executable, "-m", "ridgeline.training.train", *command(text, killed)]
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
    files = {path.name for path in (whole / "story").iterdir()}
    assert files >= {"config.json", "model.safetensors", "tokenizer.json", "training.json"}
    assert files == {path.name for path in (killed / "story").iterdir()}
    for file in files:
        assert (killed / "story" / file).read_bytes() == (whole / "story" / file).read_bytes(), file

    with pytest.raises(SystemExit, match=r"made with another .*seed"):
        train.main(command(text, killed, "--seed", "1"))
    with pytest.raises(SystemExit, match="--epochs can be changed only up to step"):
        train.main(command(text, killed, "--epochs", "9"))
    (killed / "story.checkpoint.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(SystemExit, match="is not a checkpoint of this program"):
        train.main(command(text, killed))


def test_a_shorter_run_goes_through_the_same_steps_until_its_rate_falls():
    story = dataclasses.replace(recipe.RECIPES["story"], warmup=4)
    schedules = [objective.make_optimizer(story, steps) for steps in (20, 40)]
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
