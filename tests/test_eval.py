"""Scores of texts, held to `forward` window by window; what `ridgeline eval` makes of them."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.cli import eval as command
from ridgeline.cli import main
from ridgeline.decode import buckets
from ridgeline.decode.evaluate import Comparison, evaluate
from tiny import byte_tokenizer, tiny_config, tiny_model

IDS = np.random.default_rng(0).integers(0, 509, 150).tolist()


@pytest.fixture(scope="module")
def story(bundled) -> str:
    """What the bundled model writes in float32, longer than a chunk."""
    sampling = rl.SamplingParams(max_tokens=280, temperature=0.8, seed=5, ignore_eos=True)
    return "Once upon a time" + rl.generate(bundled, "Once upon a time", sampling)[0].text


def log_probs(model: rl.Model, ids: list[int]) -> np.ndarray:
    """[T, V] of one row, by the teacher-forced pass that knows no cache."""
    return np.asarray(jax.nn.log_softmax(rl.forward(model.params, model.config, jnp.asarray([ids]))[0]))


def mixed(first: rl.Model, second: rl.Model) -> rl.Model:
    """A model that often, but not always, agrees with the first."""
    params = jax.tree.map(lambda a, b: a + 0.2 * b, first.params, second.params)
    return dataclasses.replace(first, params=params)


@pytest.mark.parametrize("stride", [7, 40])
def test_windows_score_each_token_once_as_forward_does(model, monkeypatch, stride):
    monkeypatch.setattr(buckets, "PREFILL_CHUNK", 16)  # neither the window nor the stride is a multiple
    context, losses = 40, []
    for ids in (IDS[:3], IDS):
        for target in range(1, len(ids)):
            begin = next(begin for begin in range(0, len(ids), stride) if begin + context >= target)
            row = np.resize(ids[begin : begin + context], context)  # what comes after the target is not seen
            losses.append(-log_probs(model, row.tolist())[target - 1 - begin, ids[target]])
    seen = []
    found = evaluate(
        model,
        [IDS[:3], IDS],
        context=context,
        stride=stride,
        batch_size=3,
        progress=lambda *counts: seen.append(counts),
    )
    assert found.tokens == len(losses) == 2 + 149
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)
    assert (found.bytes, found.bits_per_byte, found.context, found.stride) == (None, None, context, stride)
    assert seen == sorted(set(seen))
    assert seen[-1] == (151, 151)
    short, long = found.texts
    assert [text.tokens for text in found.texts] == [2, 149]
    assert long.score.tokens.tolist() == IDS[1:]
    np.testing.assert_allclose(np.concatenate([-short.score.logprobs, -long.score.logprobs]), losses, atol=2e-5)
    assert long.loss == pytest.approx(np.mean(losses[2:]), abs=1e-5)


def test_a_text_has_the_loss_of_forward_and_the_arithmetic_of_its_bytes(bundled, story):
    ids = bundled.tokenizer.encode(story)
    by_hand = -log_probs(bundled, ids[:-1])[np.arange(len(ids) - 1), ids[1:]]
    found = evaluate(bundled, story)
    assert (found.tokens, found.bytes) == (len(ids) - 1, len(story.encode()))
    assert found.loss == pytest.approx(by_hand.mean(), abs=1e-4)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert found.bits_per_byte == pytest.approx(by_hand.sum() / math.log(2) / len(story.encode()), rel=1e-4)
    assert (found.context, found.stride) == (1024, 512)


def test_bytes_are_those_of_the_scored_tokens():
    """Without a BOS the first byte is context only; a limit inside a character counts it whole."""
    model = dataclasses.replace(tiny_model(), tokenizer=byte_tokenizer())
    found = evaluate(model, ["fox", "a naïve fox", "unread"], limit=2 + 4)
    assert (found.tokens, found.bytes) == (6, len("ox naï".encode()))


def test_a_model_that_knows_nothing_has_the_logarithm_of_its_vocabulary(model):
    nothing = dataclasses.replace(model, params=jax.tree.map(jnp.zeros_like, model.params))
    found = evaluate(nothing, [IDS[:41]], context=40)
    assert found.loss == pytest.approx(math.log(509), rel=1e-6)
    assert found.perplexity == pytest.approx(509, rel=1e-5)


def test_comparison_is_that_of_the_distributions(model):
    other = mixed(model, tiny_model(seed=1))
    ids = IDS[:41]
    ours, theirs = log_probs(other, ids[:-1]), log_probs(model, ids[:-1])
    found = evaluate(other, [ids], context=40, against=model).comparison
    assert found.loss == pytest.approx(-theirs[np.arange(40), ids[1:]].mean(), abs=1e-5)
    agreement = (ours.argmax(-1) == theirs.argmax(-1)).mean()
    assert 0.1 < agreement < 0.9
    assert found.agreement == pytest.approx(agreement)
    assert found.divergence == pytest.approx((np.exp(theirs) * (theirs - ours)).sum(-1).mean(), rel=1e-4)
    itself = evaluate(model, [ids], context=40, against=model)
    assert itself.comparison == Comparison(itself.loss, 1.0, 0.0)


@pytest.mark.parametrize(
    ("schemes", "kv_dtype", "bound"),
    [({}, "fp8", 0.005), ({"quantize": "int8"}, "int8", 0.005), ({"quantize": "int4-32"}, None, 0.03)],
)
def test_schemes_cost_little_of_the_loss(bundled, story, schemes, kv_dtype, bound):
    plain = evaluate(bundled, story).loss
    stored = rl.load_model("bundled", dtype="float32", **schemes)
    found = evaluate(stored, story, kv_dtype=kv_dtype, against=bundled)
    assert found.comparison.loss == pytest.approx(plain, abs=1e-6)
    assert found.loss == pytest.approx(plain, rel=bound)
    assert found.comparison.divergence > 1e-6  # it was read in fewer bits


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("some text", {}, "text 0 is text, but the model has no tokenizer"),
        ([IDS, [3]], {}, "text 1 has 1 tokens; the first is context only"),
        ([[1, 509]], {}, "text 0 has token id 509; the vocabulary is 0 to 508"),
        ([], {}, "no text to score"),
        ([IDS], {"context": 513}, "context is 513; it must be between 1 and 512"),
        ([IDS], {"context": 8, "stride": 9}, "stride is 9; it must be between 1 and 8"),
        ([IDS], {"batch_size": 0}, "batch_size is 0"),
        ([IDS], {"limit": 0}, "limit is 0"),
        ([IDS], {"kv_dtype": "int3"}, "kv_dtype 'int3' is not known"),
        ([IDS], {"against": tiny_model(tiny_config(vocab_size=50))}, "509 and 50 tokens"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, texts, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model, texts, **options)


# --- the command ---


@pytest.fixture
def file(tmp_path, story):
    (tmp_path / "story.txt").write_text(story, encoding="utf-8")
    return tmp_path / "story.txt"


def test_command_prints_what_the_library_finds(capsys, monkeypatch, file, story):
    monkeypatch.setenv("COLUMNS", "80")
    schemes = {"quantize": "int8", "quantize_output": "int8"}
    stored = rl.load_model("bundled-draft", dtype="float32", **schemes)
    reference = rl.load_model("bundled-draft", dtype="float32")
    sizes = {"context": 32, "stride": 24, "limit": 60}
    expected = evaluate(stored, story, kv_dtype="fp8", batch_size=2, against=reference, **sizes)
    args = "--model bundled-draft --dtype float32 --quantize int8 --quantize-output int8 --kv-dtype fp8 --context 32"
    args = f"eval --text {file} {args} --stride 24 --limit 60 --batch 2 --against float32".split()
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    settings = {"text": "story.txt", "model": "bundled-draft", "kv_dtype": "fp8"}
    dtypes = {"dtype": "float32", "against": "float32"}
    assert report == settings | dtypes | schemes | expected.as_dict()
    assert report["loss_delta"] == pytest.approx(report["loss"] / report["reference_loss"] - 1)
    assert main(args) == 0
    tables, note = capsys.readouterr().out.split("Every token")
    assert max(map(len, tables.splitlines())) <= 80
    words = " ".join((tables + note).split())
    for part in (
        "bundled-draft on story.txt: weights int8, output int8, KV fp8",
        f"{report['loss']:.4f}",
        f"{report['bits_per_byte']:.4f}",
        f"{report['top1_agreement']:.2%}",
        f"{report['kl_divergence']:.6f}",
        "windows of 32 tokens that start 24 apart: after the first window, each from at least 9 tokens",
    ):
        assert part in words


def test_command_names_a_text_that_is_not_finite(capsys, monkeypatch, file):
    model = rl.load_model("bundled-draft")
    broken = dataclasses.replace(model, params=jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), model.params))
    monkeypatch.setattr(command, "load_model", lambda *_, **__: broken)
    assert main(["eval", "--text", str(file), "--limit", "3", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "ridgeline: text 0: the log-probability of token 1 (id " in err


@pytest.mark.parametrize(
    ("content", "args", "message"),
    [
        (b"", [], "text.txt is empty; name a file with some text in it"),
        (b"caf\xe9", [], "text.txt is not UTF-8"),
        (None, [], "text.txt cannot be read: No such file"),
        (b"Once", ["--context", "1025"], "context is 1025; it must be between 1 and 1024"),
        (b"Once", ["--limit", "0"], "limit is 0; it must be positive"),
        (b"Once", ["--quantize", "int3"], "invalid choice: 'int3'"),
        (b"Once", ["--kv-dtype", "int4"], "invalid choice: 'int4'"),
        (b"Once", ["--tensor", "4096"], "needs 4096 devices"),
    ],
)
def test_bad_usage_is_one_line_without_a_traceback(capsys, tmp_path, content, args, message):
    text = tmp_path / "text.txt"
    if content is not None:
        text.write_bytes(content)
    assert main(["eval", "--text", str(text), "--model", "bundled-draft", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
