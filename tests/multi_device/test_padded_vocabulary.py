"""A vocabulary that the devices do not divide: padded where it lies, and nowhere to be seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import ridgeline as rl
from checkpoints import assert_same
from families import write_checkpoint
from ridgeline.decode.loop import decode_steps
from ridgeline.model.loading import convert_model
from ridgeline.model.params import abstract_params
from ridgeline.programs import abstract_cache
from ridgeline.sharding.hlo import collectives, parse

V = 509
HEADS = {2: (8, 2), 3: (6, 3), 8: (8, 4)}
PROMPTS = [list(range(1, 24)), [5], [7, 11, 300, 2], list(range(200, 212))]
SAMPLING = [
    rl.SamplingParams(seed=1, max_tokens=6),
    rl.SamplingParams(temperature=0.0, max_tokens=6, logprobs=-1),
    rl.SamplingParams(seed=3, top_k=400, top_p=0.99, max_tokens=6),
    rl.SamplingParams(seed=4, repetition_penalty=1.3, allowed_token_ids=[3, V - 1], max_tokens=6),
]


def checkpoint(folder, tensor, **sizes):
    return write_checkpoint(folder / "checkpoint", "llama3", *HEADS[tensor], vocab_size=V, **sizes)


@pytest.mark.parametrize(("tensor", "tied"), [(2, True), (3, False), (8, True)])
def test_everything_is_as_on_one_device(tmp_path, tensor, tied):
    directory = checkpoint(tmp_path, tensor, tie_word_embeddings=tied)
    one, split = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(tensor=tensor))
    tokens = np.arange(24).reshape(2, 12)
    expected, logits = (rl.forward(m.params, m.config, tokens) for m in (one, split))
    assert logits.shape == (2, 12, V)
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    cache = rl.init_cache(split.config, 2, 64, mesh=split.mesh)
    outside, _ = rl.extend(split.params, split.config, jnp.asarray(tokens), jnp.array([12, 12]), cache)  # of a program
    np.testing.assert_allclose(outside, expected[:, -1], atol=1e-4)
    drafter = rl.ModelDrafter(split, tokens=3) if tensor == 8 else None
    with rl.Engine(split, max_batch_size=4, max_length=64, whole_batches=True, drafter=drafter) as engine:
        places = [engine.submit(*request) for request in zip(PROMPTS, SAMPLING, strict=True)]
        outputs = {chunk.index: chunk.output for chunk in engine.run() if chunk.output}
    for ours, theirs in zip((outputs[n] for n in places), rl.generate(one, PROMPTS, SAMPLING), strict=True):
        assert ours.tokens == theirs.tokens
        for x, y in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert (x.rank, list(x.top)) == (y.rank, list(y.top))
    (expected,), (scores,) = (rl.score(m, PROMPTS[:1], [[[V - 1, 4], [8]]], top=V) for m in (one, split))
    for ours, theirs in zip(scores, expected, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
        assert ours.top_ids.tolist() == theirs.top_ids.tolist()
    expected, beams = (rl.beam_search(m, PROMPTS[:1], 3, 4)[0].sequences for m in (one, split))
    assert [beam.tokens for beam in beams] == [beam.tokens for beam in expected]


@pytest.mark.parametrize("converted", [False, True])
@pytest.mark.parametrize("scheme", [None, "int8", "int4-32-zero"])
def test_files_know_nothing_of_it(tmp_path, scheme, converted):
    sizes = {"hidden_size": 64, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": False}
    directory, mesh = checkpoint(tmp_path, 8, **sizes), rl.make_mesh(tensor=8)
    files = safetensors.numpy.load_file(directory / "model.safetensors")
    source = convert_model(directory, tmp_path / "out", quantize=scheme) if converted else directory
    quantize = None if converted else scheme
    one, model = (rl.load_model(source, quantize=quantize, quantize_output=quantize, mesh=m) for m in (None, mesh))
    embedding, unembedding = (model.params[name] for name in ("embedding", "unembedding"))
    assert embedding.shape[0] == unembedding.shape[0] == 512
    assert not np.asarray(embedding[V:]).any()
    np.testing.assert_allclose(*(rl.forward(m.params, m.config, jnp.arange(20)[None]) for m in (one, model)), atol=1e-4)
    views = [rl.hf_view(m.params, m.config) for m in (one, model)]
    assert_same(*views)
    assert views[1]["lm_head.weight"].shape == (V, 64)
    restored = rl.from_hf_view(views[1], model.config, mesh)
    assert jax.tree.map(lambda a: a.sharding, restored) == jax.tree.map(lambda a: a.sharding, model.params)
    assert_same(rl.hf_view(restored, model.config), views[0])
    if not converted:
        saved = rl.save_model(model, tmp_path / "saved")
        assert_same(rl.load_model(saved).params, one.params)
        if scheme is None:
            assert_same(safetensors.numpy.load_file(saved / "model.safetensors"), files)


def test_blocks_of_rows_are_shared_whole_or_refused(tmp_path):
    sizes = {"hidden_size": 128, "tie_word_embeddings": False}
    for vocabulary, tensor in ((384, 2), (V, 2)):
        directory = write_checkpoint(tmp_path / str(vocabulary), "llama3", 8, 2, vocab_size=vocabulary, **sizes)
        load = functools.partial(rl.load_model, directory, quantize_output="fp8-block")
        if vocabulary == V:
            with pytest.raises(ValueError, match="vocab_size 509 makes blocks of 1 rows, not 128, which a tensor axis"):
                load(mesh=rl.make_mesh(tensor=tensor))
            continue
        one, model = load(), load(mesh=rl.make_mesh(tensor=tensor))
        assert model.params["unembedding"].scales.shape[0] == 4
        assert_same(*(rl.hf_view(m.params, m.config)["lm_head.weight"] for m in (one, model)))


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"top_p": 0.9}], ids=str)
def test_it_communicates_what_one_that_divides_does(sampling):
    mesh, sampling = rl.make_mesh(tensor=8), rl.SamplingParams(**sampling)

    def communicated(vocabulary):
        config = rl.preset("llama-3.2-1b")
        config = config.replace(layers=config.layers[:1], vocab_size=vocabulary, dtype="float32", ffn_dim=64)
        cache = abstract_cache(config, mesh, 4, 128)
        state, plan = rl.make_sampling_state([sampling] * 4, None, [0] * 4, vocabulary, mesh=mesh)
        tokens = jnp.zeros(4, jnp.int32)
        program = decode_steps.lower(abstract_params(config, mesh), config, tokens, cache, state, plan, 2).compile()
        return {(found.kind, found.count, found.bytes) for found in collectives(parse(program.as_text()))}

    assert communicated(65531) == communicated(65536)
