"""The engine on meshes: rows and pages of each data shard, and the tokens of one device."""

import random

import ridgeline as rl
from families import write_checkpoint

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
