"""Every family on meshes of eight devices: the logits of one device, of prefill and of greedy steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import ridgeline as rl
from families import write_checkpoint
from ridgeline.model import products
from ridgeline.model.layers import linear
from ridgeline.model.params import ParamSpec

FAMILIES = ["llama3", "llama_bias", "qwen3", "gemma2", "gemma3", "phi3", "olmo2"]
PROMPTS = [list(range(1, 24)), [5], [7, 11, 300, 2], list(range(200, 212))]


def outputs(model: rl.Model) -> np.ndarray:
    """Logits of prefill and of a few greedy steps; each program is awaited."""
    tokens = np.zeros((4, 32), np.int32)
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array([len(p) for p in PROMPTS], np.int32)
    cache = rl.init_cache(model.config, 4, 64, mesh=model.mesh)
    logits, cache = jax.block_until_ready(rl.prefill(model.params, model.config, tokens, lengths, cache))
    steps = [np.asarray(logits)]
    for _ in range(4):
        logits, cache = jax.block_until_ready(
            rl.decode_step(model.params, model.config, steps[-1].argmax(axis=-1), cache)
        )
        steps.append(np.asarray(logits))
    return np.stack(steps)


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """One device's outputs and the checkpoint, by family and heads."""
    made = {}

    def reference(family: str, heads: int, kv_heads: int):
        key = family, heads, kv_heads
        if key not in made:
            directory = write_checkpoint(tmp_path_factory.mktemp("checkpoint") / family, *key)
            made[key] = directory, outputs(rl.load_model(directory))
        return made[key]

    return reference


CASES = [
    *[(family, 8, 4, {"tensor": 4}) for family in FAMILIES],
    *[("llama3", 8, 4, mesh) for mesh in ({"tensor": 1}, {"tensor": 8}, {"data": 4, "tensor": 2})],
    ("gemma2", 8, 4, {"data": 2, "tensor": 4}),
    ("phi3", 8, 4, {"data": 4}),
    ("llama3", 8, 1, {"tensor": 8}),
    ("llama3", 8, 2, {"data": 2, "tensor": 4}),
    ("llama3", 6, 3, {"tensor": 6}),
    ("phi3", 8, 2, {"tensor": 8}),
    ("gpt_oss", 8, 2, {"expert": 2, "tensor": 4}),
    ("glm4_moe", 8, 4, {"data": 2, "expert": 2, "tensor": 2}),
]


@pytest.mark.parametrize(("family", "heads", "kv_heads", "mesh"), CASES, ids=str)
def test_a_mesh_computes_what_one_device_does(references, family, heads, kv_heads, mesh):
    directory, expected = references(family, heads, kv_heads)
    model = rl.load_model(directory, mesh=rl.make_mesh(**mesh))
    np.testing.assert_allclose(outputs(model), expected, atol=1e-4)


def test_forward_takes_split_weights(references):
    directory, _ = references("llama3", 8, 4)
    tokens = np.arange(48).reshape(4, 12)
    one, split = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))
    expected, logits = (rl.forward(model.params, model.config, tokens) for model in (one, split))
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    own = jax.make_mesh((8,), ("rows",), axis_types=(AxisType.Auto,))  # of a user, on whose axes nothing is split
    copies = jax.device_put(one.params, NamedSharding(own, PartitionSpec()))
    np.testing.assert_allclose(rl.forward(copies, one.config, tokens), expected, atol=1e-4)


def test_seeded_sampling_on_a_split_vocabulary(references):
    directory, _ = references("llama3", 8, 4)
    params = [
        rl.SamplingParams(seed=1, max_tokens=8),
        rl.SamplingParams(seed=2, max_tokens=8, top_k=20, logprobs=3),
        rl.SamplingParams(seed=3, max_tokens=8, top_p=0.8, min_p=0.01),
        rl.SamplingParams(seed=4, max_tokens=8, repetition_penalty=1.3, logit_bias={4: 3.0}, min_tokens=2),
    ]
    one, split = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))
    for batch in (params, [params[1]] * 4, [params[0]] * 4):
        for a, b in zip(rl.generate(one, PROMPTS, batch), rl.generate(split, PROMPTS, batch), strict=True):
            assert a.tokens == b.tokens
            for x, y in zip(a.logprobs or [], b.logprobs or [], strict=True):
                assert (x.rank, list(x.top)) == (y.rank, list(y.top))


def test_sums_over_devices_lose_no_more_than_the_rounding_of_their_parts(monkeypatch):
    """The way of GPUs, where each part is rounded to bfloat16 before they are added up."""
    monkeypatch.setattr(products, "product_cpu", lambda x, w: products._by_xla(x, w, jnp.bfloat16))
    mesh, rng = rl.make_mesh(tensor=8), np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((4, 512), (64, 512)))
    split = NamedSharding(mesh, PartitionSpec(None, "tensor"))
    spec = ParamSpec(w.shape, "bfloat16", ("embed", "ffn"), in_axes=1)
    program = jax.jit(lambda x, w: linear(x, w, spec))
    y = np.asarray(program(*jax.device_put((x, w), split)), np.float64)
    parts = np.einsum("mpi,opi->pmo", *(np.asarray(a, np.float64).reshape(-1, 8, 64) for a in (x, w)))
    exact, half_ulp = parts.sum(axis=0), 2.0**-8
    bound = half_ulp * (np.abs(parts).sum(axis=0) + np.abs(exact))
    error = np.abs(y - exact)
    assert (error <= bound).all()
    assert error.max() > 0


def test_each_device_holds_only_its_part(references):
    directory, _ = references("llama3", 8, 4)
    model = rl.load_model(directory, mesh=rl.make_mesh(tensor=4))
    whole = rl.load_model(directory)
    for (path, leaf), full in zip(
        jax.tree_util.tree_leaves_with_path(model.params), jax.tree.leaves(whole.params), strict=True
    ):
        split = leaf.addressable_shards[0].data.size
        norm = "norm" in jax.tree_util.keystr(path)
        assert split == (full.size if norm else full.size // 4), path
        np.testing.assert_array_equal(leaf, full)


def test_rows_that_do_not_divide_are_refused(references):
    directory, _ = references("llama3", 8, 4)
    model = rl.load_model(directory, mesh=rl.make_mesh(data=4))
    with pytest.raises(ValueError, match="batch_size is 6 and mesh axis 'data' has 4 devices"):
        rl.init_cache(model.config, 6, 32, mesh=model.mesh)
    assert len(rl.generate(model, PROMPTS[:3], rl.SamplingParams(max_tokens=4))) == 3  # which pads its batches
