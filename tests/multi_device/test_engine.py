"""The engine on meshes: rows and pages of each data shard, and the tokens of one device."""

import random

import jax.numpy as jnp
import numpy as np

import ridgeline as rl
from families import FIXTURES, write_checkpoint

REQUESTS = [
    (list(range(n, n + length)), rl.SamplingParams(seed=n, max_tokens=6 + n, temperature=n % 2))
    for n, length in enumerate((3, 90, 70, 1, 130, 20))
]


def test_random_schedules_on_a_mesh(tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint", "gemma3", 8, 4)
    one, model = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))
    expected = [rl.generate(one, [prompt], params)[0].tokens for prompt, params in REQUESTS]
    rng = random.Random(0)
    with rl.Engine(model, max_batch_size=4, max_length=192, cache_tokens=64 * 8, prefill_tokens=64) as engine:
        for _ in range(5):
            places, to_come = {}, list(range(len(REQUESTS)))
            rng.shuffle(to_come)
            while to_come or engine.has_work:
                if to_come and rng.random() < 0.5:
                    place = to_come.pop()
                    places[engine.submit(*REQUESTS[place])] = place
                for chunk in engine.step():
                    if chunk.output:
                        assert chunk.output.tokens == expected[places[chunk.index]]
        stats = engine.stats()
    assert stats.prefix_hit_rate > 0
    assert stats.pages_used == 0


def test_interventions_and_constraints_on_a_mesh(tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint", "llama3", 8, 4)
    one, split = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))

    class Thirds:
        def mask(self):
            return np.arange(one.config.vocab_size) % 3 == 1

        def accept(self, token):
            assert token % 3 == 1

    seams = {
        "residual": lambda x, n: x + 0.1 if n == 1 else x,
        "component": lambda name, x, layer: x.at[..., ::2].multiply(-1.0) if name in ("heads", "neurons") else x,
        "adjust": lambda logits, context: jnp.where(context.positions[:, None] % 2, -logits, logits),
    }
    prompts = [prompt for prompt, _ in REQUESTS[:3]]
    sampling = [rl.SamplingParams(temperature=0.0, max_tokens=8, constraint=Thirds if n else None) for n in range(3)]
    expected = [output.tokens for output in rl.generate(one, prompts, sampling, **seams)]
    assert [output.tokens for output in rl.generate(split, prompts, sampling, **seams)] == expected


def test_drafters_on_a_mesh(tmp_path):
    directory = write_checkpoint(tmp_path / "checkpoint", "gemma3", 8, 4)
    one, split = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))
    prompts, sampling = zip(*REQUESTS, strict=True)
    expected = [output.tokens for output in rl.generate(one, prompts, sampling)]
    for drafter in (rl.NGramDrafter(), rl.ModelDrafter(split)):
        outputs = rl.generate(split, prompts, sampling, drafter=drafter)
        assert [output.tokens for output in outputs] == expected
    assert all(output.accepted == output.drafted > 0 for output in outputs)


def test_an_eagle_head_on_a_mesh(tmp_path):
    """Its two KV heads on four devices."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "vocab_size": 64}
    directory = write_checkpoint(tmp_path / "checkpoint", "llama3", 8, 4, **sizes)
    one, split = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))
    prompts = [[token % 64 for token in prompt] for prompt, _ in REQUESTS]
    sampling = [params for _, params in REQUESTS]
    drafter = rl.EagleDrafter(FIXTURES.parent / "eagle", tokens=3)
    expected, outputs = (rl.generate(model, prompts, sampling, drafter=drafter) for model in (one, split))
    assert [output.tokens for output in outputs] == [output.tokens for output in expected]
    assert [(output.drafted, output.accepted) for output in outputs] == [(o.drafted, o.accepted) for o in expected]
