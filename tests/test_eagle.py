"""EAGLE-3 heads: what the published code computes, from the files that are published, and in the engine."""

import functools
import itertools
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import ridgeline as rl
from ridgeline.decode.cache import Rows
from ridgeline.decode.sampling.state import make_sampling_state
from ridgeline.decode.speculation.drafter import Texts
from tiny import tiny_config, tiny_model

HEAD = pathlib.Path(__file__).parent / "fixtures" / "eagle"
EXPECTED = {name: jnp.asarray(array) for name, array in np.load(HEAD / "expected.npz").items()}
ROPE = rl.RopeConfig(rotary_dim=8)
SIZES = {"vocab_size": 64, "embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "max_position": 128}


def target(layers=8):
    return tiny_model(tiny_config(**SIZES, layers=(rl.LayerConfig(ROPE),) * layers))


def rows_of(length, most=64):
    """One row on two pages."""
    length = jnp.array([length], jnp.int32)
    return Rows(length, jnp.full_like(length, most), length, (jnp.array([[0, 1]], jnp.int32),), (0,))


@functools.partial(jax.jit, static_argnames=("drafter", "plan"))
def propose(drafter, plan, *arguments):
    return drafter.propose(*arguments, plan, None)[0][0]


def greedy_guesses(drafter, params, pages, rows, history, features):
    state, plan = make_sampling_state([rl.SamplingParams(temperature=0.0)], None, [0], 64)
    return propose(drafter, plan, params, pages, Texts(rows, history, features, state)).tolist()


def as_specforge(tensors):
    """Names of a layer that is one of several, and without the embedding, which is the target's."""
    named = {name.replace("midlayer.", "layers.0."): tensor for name, tensor in tensors.items()}
    return {f"model.{name}" if name != "lm_head.weight" else name: tensor for name, tensor in named.items()}


def rewritten(folder, change=lambda tensors: tensors, **config):
    shutil.copytree(HEAD, folder)
    tensors = change(safetensors.numpy.load_file(HEAD / "model.safetensors"))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    settings = json.loads((HEAD / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("change", [lambda tensors: tensors, as_specforge], ids=["midlayer", "layers.0"])
@pytest.mark.parametrize("chunk", [11, 4])
def test_a_head_computes_what_the_published_code_does(tmp_path, change, chunk):
    tokens, features, N = EXPECTED["tokens"], EXPECTED["features"], 11
    params, drafter = rl.EagleDrafter(rewritten(tmp_path / "head", change), tokens=5).bind(target())
    pages = drafter.init_pages([2], 32, None, None)
    for start in range(0, N, chunk):
        of = slice(start, min(start + chunk, N))
        text = tokens[None, :-1][:, of], jnp.array([of.stop - of.start]), rows_of(start)
        x = drafter._head_input(params, features[None, of])
        hidden, _ = drafter._layer(params, pages, tokens[None, 1:][:, of], x, text[2].lengths, text[1], text[2])
        logits = drafter._logits(params, hidden[0])
        ids = np.flatnonzero(np.isfinite(logits[0]))
        np.testing.assert_allclose(logits[:, ids], EXPECTED["logits"][of], atol=1e-4)
        pages = drafter.read(params, pages, *text, tokens[None, 1:][:, of], features[None, of])
    history = jnp.zeros((1, 32), jnp.int32).at[0, : N + 1].set(tokens)
    guesses = greedy_guesses(drafter, params, pages, rows_of(N), history, features[None, -1])
    assert guesses == EXPECTED["guesses"].tolist()


REQUESTS = [
    ([1, 2, 3], rl.SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)),
    ([*range(40), *range(40)], rl.SamplingParams(seed=1, max_tokens=30, logprobs=1)),
    ([*range(40), 7], rl.SamplingParams(seed=2, max_tokens=25, prompt_logprobs=1, repetition_penalty=1.2)),
    ([9], rl.SamplingParams(seed=3, max_tokens=25, top_k=5)),
]


@functools.partial(jax.jit, static_argnames=("config", "drafter"))
def features_and_pages(params, config, drafter, head, text, length):
    """The target's states of a whole text, and what the head reads of it at once."""
    streams = []
    rl.transformer(params, config, text, residual=lambda x, n: streams.append(x) or x)
    features, following = jnp.concatenate([streams[n] for n in (2, 4, 5)], axis=-1), jnp.roll(text, -1, axis=1)
    pages = drafter.init_pages([2], 64, None, None)
    pages = drafter.read(head, pages, text, length[None], rows_of(0, 128), following, features)
    return features[:, length - 1], pages


def test_the_engine_drafts_as_a_head_that_reads_the_whole_text_at_once(monkeypatch):
    """And the tokens are those of plain decoding: in chunks, preempted, with rounds that draft 3, 1 and no tokens."""
    model, checked = target(), 0
    expected = [output.tokens for output in rl.generate(model, *zip(*REQUESTS, strict=True))]
    sizes = {"max_batch_size": 3, "max_length": 128, "prefill_tokens": 32, "cache_tokens": 64 * 4}
    with rl.Engine(model, drafter=rl.EagleDrafter(HEAD, tokens=3), whole_batches=True, **sizes) as engine:
        picked, runner = itertools.cycle([3, 3, 0, 1, 0, 3, 3, 0, 0, 1]), engine._runner
        head, bound, decode = runner._draft_params, runner._drafter, runner.decode

        def checking(rows, steps, plan, masks=None, drafted=0):
            nonlocal checked
            for row in rows if drafted else ():
                length = row.made - 1
                text = np.zeros((1, 128), np.int32)
                text[0, : row.made] = row.tokens[: row.made]
                features, pages = features_and_pages(model.params, model.config, bound, head, text, np.int32(length))
                np.testing.assert_allclose(runner.state.features[row.slot], features[0], atol=1e-4)
                own = rows_of(length, 128).replace(
                    block_tables=tuple(jnp.asarray(t[row.slot][None, :2]) for t in runner._tables)
                )
                ours, fresh = (
                    greedy_guesses(bound, head, held, at, jnp.asarray(text), features)
                    for held, at in ((runner.draft_pages, own), (pages, rows_of(length, 128)))
                )
                assert ours == fresh
                checked += 1
            return decode(rows, steps, plan, masks, drafted)

        monkeypatch.setattr(engine._drafts, "pick", lambda rows: next(picked))
        monkeypatch.setattr(runner, "decode", checking)
        places = [engine.submit(*request) for request in REQUESTS]
        outputs = {chunk.index: chunk.output for chunk in engine.run() if chunk.output}
    for place, tokens in zip(places, expected, strict=True):
        outputs[place].raise_for_error()
        assert outputs[place].tokens == tokens
    assert checked > 20


def test_what_is_refused(tmp_path):
    def bind(name, model=None, change=lambda tensors: tensors, **config):
        return rl.EagleDrafter(rewritten(tmp_path / name, change, **config)).bind(model or target())

    with pytest.raises(ValueError, match=r"after layers \(2, 2, 1\), and the target has 4"):
        bind("layers", target(4))
    bind("named", target(4), eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 1, 3]})
    with pytest.raises(ValueError, match="for a target of vocab_size 64 and hidden_size 32; tiny has 509 and 48"):
        bind("other", tiny_model())
    with pytest.raises(rl.CheckpointError, match=r"lacks model\.fc\.weight"):
        bind("missing", change=lambda tensors: {n: t for n, t in tensors.items() if n != "fc.weight"})
    with pytest.raises(rl.CheckpointError, match=r"lacks 'model.d2t'"):
        bind("map", change=lambda tensors: {n: t for n, t in tensors.items() if n != "d2t"})
    with pytest.raises(rl.CheckpointError, match="'d2t' does not name 40 of 64 tokens"):
        bind("beyond", change=lambda tensors: tensors | {"d2t": tensors["d2t"] + 60})
    with pytest.raises(rl.CheckpointError, match="num_hidden_layers is 2, which is not supported"):
        bind("deep", num_hidden_layers=2)
    with pytest.raises(ValueError, match="tokens is 16; a drafter guesses 1 to 15"):
        rl.EagleDrafter(HEAD, tokens=16)
