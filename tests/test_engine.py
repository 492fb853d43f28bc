"""The engine: whatever the company, a request gives the tokens it gives alone; and what fails or ends meanwhile."""

import asyncio
import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.benchmarks.replay import counted_compilations
from ridgeline.decode.engine import sizes
from ridgeline.decode.engine.runner import Runner
from tiny import byte_tokenizer, tiny_config, tiny_model

SMALL = {"max_batch_size": 4, "max_length": 192, "prefill_tokens": 64, "whole_batches": True}
GREEDY = rl.SamplingParams(temperature=0.0, max_tokens=10)


def long_context(kind):
    """Ropes whose keys depend on the length that a row has."""
    factors = {"short_factor": (1.0,) * 10, "long_factor": tuple(1.0 + n for n in range(10))}
    rope = rl.RopeConfig(rotary_dim=20, kind=kind, original_max_position=80, factor=4.0, **factors)
    return tiny_config(layers=(rl.LayerConfig(rope, window=70), rl.LayerConfig(rope)))


def requests_for(rng, vocab_size):
    """Prompts that share beginnings of one and of two pages, with every kind of sampling."""
    shared = [rng.randrange(vocab_size) for _ in range(128)]
    prompts = [
        shared[:length] + [rng.randrange(vocab_size) for _ in range(n)] for length in (0, 64, 128) for n in (1, 9, 30)
    ]
    prompts += [shared[:64], shared]
    asked = [
        {"temperature": 0.0},
        {"seed": 1},
        {"seed": 2, "top_k": 20, "top_p": 0.9},
        {"seed": 3, "repetition_penalty": 1.2, "min_tokens": 3, "presence_penalty": 0.5},
        {"temperature": 0.0, "logprobs": 2},
    ]
    return [
        (prompt, rl.SamplingParams(max_tokens=rng.randint(3, 30), **asked[n % 5])) for n, prompt in enumerate(prompts)
    ]


def alone(model, requests):
    return [rl.generate(model, [prompt], params)[0] for prompt, params in requests]


def one_by_one(model, requests, **options):
    """Each alone in an engine whose programs are those of the others."""
    outputs = []
    with rl.Engine(model, prefix_caching=False, **options) as engine:
        for request in requests:
            engine.submit(*request)
            outputs += [chunk.output for chunk in engine.run() if chunk.output]
    return outputs


def play(engine, rng, requests, aborts=0.0, most=8):
    """Submits some of the requests at random times; outputs by the request's place."""
    places, chosen = {}, rng.choices(range(len(requests)), k=rng.randint(1, most))
    outputs = []
    while chosen or engine.has_work:
        while chosen and rng.random() < 0.4:
            place = chosen.pop()
            places[engine.submit(*requests[place], priority=rng.choice((0, 0, 1)))] = place
        if places and rng.random() < aborts:
            engine.abort(rng.choice(list(places)))
        outputs += [(places[chunk.index], chunk.output) for chunk in engine.step() if chunk.output]
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    return outputs


def check(outputs, expected):
    for place, output in outputs:
        if output.error is not None:
            raise output.error
        if output.finish_reason == "abort":
            assert output.tokens == expected[place].tokens[: len(output.tokens)]
        else:
            assert (output.tokens, output.finish_reason) == (expected[place].tokens, expected[place].finish_reason)


@pytest.mark.parametrize("config", [tiny_config(), long_context("longrope"), long_context("dynamic")])
def test_any_mix_gives_the_tokens_of_each_alone(config):
    """Pages are few, so that rows are preempted."""
    model, rng = tiny_model(config), random.Random(0)
    requests, options = requests_for(rng, config.vocab_size), SMALL | {"cache_tokens": 64 * 5}
    expected = one_by_one(model, requests, **options)
    with rl.Engine(model, **options) as engine:
        for _ in range(60):
            check(play(engine, rng, requests, aborts=0.02), expected)
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_rate > 0.05


def test_batch_invariant_in_bfloat16():
    """Logits too, to the bit."""
    model, rng = tiny_model(tiny_config(dtype="bfloat16", max_position=192)), random.Random(4)
    requests = [(prompt, dataclasses.replace(params, logprobs=3)) for prompt, params in requests_for(rng, 509)]
    options = SMALL | {"cache_tokens": 64 * 5, "batch_invariant": True}
    expected = one_by_one(model, requests, **options)
    with rl.Engine(model, **options) as engine:
        for _ in range(30):
            outputs = play(engine, rng, requests)
            check(outputs, expected)
            assert all(output.logprobs == expected[place].logprobs for place, output in outputs)
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_rate > 0.05


def test_nothing_is_compiled_after_warm_up(model):
    rng = random.Random(3)
    requests = requests_for(rng, 509)
    with rl.Engine(model, **SMALL | {"max_batch_size": 2, "whole_batches": False}) as engine:
        engine.warm_up()
        with counted_compilations() as compilations:
            for _ in range(40):
                play(engine, rng, requests, aborts=0.02)
        assert compilations() == 0


def test_the_bundled_model_in_300_random_schedules(bundled, optimized):
    rng = random.Random(1)
    texts = ["Once upon a time", "The dog", "There was a little girl who", "In the forest " * 20]
    requests = [
        (text, rl.SamplingParams(max_tokens=rng.randint(1, 25), seed=seed, temperature=0.8 * (seed % 2)))
        for seed, text in enumerate(texts * 2)
    ]
    expected = alone(bundled, requests)
    with rl.Engine(bundled, max_batch_size=4, max_length=256, cache_tokens=256, whole_batches=True) as engine:
        for _ in range(300):
            check(play(engine, rng, requests, most=5), expected)
        assert engine.stats().preemptions > 0


def test_prompts_begin_with_the_pages_of_earlier_ones(model):
    prompt = list(range(150))
    with rl.Engine(model, **SMALL) as engine:
        for _ in range(2):
            engine.submit(prompt, GREEDY)
            (output,) = [chunk.output for chunk in engine.run() if chunk.output]
        assert engine.stats().prefix_hit_rate == 128 / 300
        follow_up = prompt + output.tokens + [1] * 20  # a chat goes on: the answer's pages are there too
        engine.submit(follow_up, GREEDY)
        list(engine.run())
        assert engine.stats().prefix_hit_rate == (128 + 128) / (300 + len(follow_up))
    with rl.Engine(model, prefix_caching=False, **SMALL) as engine:
        for _ in range(2):
            engine.submit(prompt, GREEDY)
            list(engine.run())
        assert engine.stats().prefix_hit_rate == 0


@pytest.mark.parametrize("options", [{}, {"prefill_tokens": 1024, "max_batch_size": 2}, {"batch_invariant": True}])
def test_samples_are_those_of_each_seed_alone_and_their_prompt_is_computed_once(model, monkeypatch, options):
    prompts, n, read = [list(range(150)), [*range(64), 7, 8, 9]], 3, []
    prefill = Runner.prefill
    monkeypatch.setattr(Runner, "prefill", lambda self, chunks, *a: read.extend(chunks) or prefill(self, chunks, *a))
    with rl.Engine(model, **SMALL | options) as engine:
        for prompt in prompts:
            engine.submit(prompt, rl.SamplingParams(seed=2**64 - 2, n=n, max_tokens=9, temperature=8.0))
        chunks = list(engine.run())
    # All of the longer prompt, of the other all after their common page; then what is left after the last full page.
    assert sum(chunk.count for chunk in read) == 150 + (n - 1) * (150 % 64) + n * 3
    for index, prompt in enumerate(prompts):
        (output,) = [chunk.output for chunk in chunks if chunk.index == index and chunk.output]
        assert [sample.seed for sample in output.samples] == [2**64 - 2, 2**64 - 1, 0]
        assert len({tuple(sample.tokens) for sample in output.samples}) == n
        for number, sample in enumerate(output.samples):
            (alone,) = rl.generate(model, [prompt], rl.SamplingParams(seed=sample.seed, max_tokens=9, temperature=8.0))
            assert sample.tokens == alone.tokens
            streamed = [chunk for chunk in chunks if (chunk.index, chunk.sample) == (index, number)]
            assert [token for chunk in streamed for token in chunk.tokens] == sample.tokens
            assert [chunk.finish_reason for chunk in streamed if chunk.finish_reason] == ["length"]


def test_an_abort_ends_all_samples_and_they_keep_what_they_have(model):
    with rl.Engine(model, **SMALL) as engine:
        request = engine.submit([1, 2, 3], rl.SamplingParams(seed=1, n=3, max_tokens=50, temperature=8.0))
        engine.step()
        first = engine.step()
        engine.abort(request)
        (output,) = [chunk.output for chunk in engine.step() if chunk.output]
        assert [sample.finish_reason for sample in output.samples] == ["abort"] * 3
        assert {chunk.sample for chunk in first} == {0, 1, 2}
        assert engine.stats().finished == 3
        assert not list(engine.run())


def test_log_probabilities_of_prompts_are_those_of_forward(model):
    """Of prompts whose beginnings other requests have cached, in chunks, and of rows that are preempted."""
    rng = random.Random(5)
    asked = [{"prompt_logprobs": 2}, {}, {"prompt_logprobs": 0}]
    requests = [
        (prompt, dataclasses.replace(GREEDY, **asked[n % 3])) for n, (prompt, _) in enumerate(requests_for(rng, 509))
    ]
    with rl.Engine(model, **SMALL | {"cache_tokens": 64 * 5}) as engine:
        outputs = [output for _ in range(20) for output in play(engine, rng, requests)]
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_rate > 0.05
    for place, output in outputs:
        prompt, params = requests[place]
        if params.prompt_logprobs is None:
            assert output.prompt_logprobs is None
            continue
        first, *others = output.prompt_logprobs
        assert first is None
        assert [next(iter(of_token)) for of_token in others] == prompt[1:]
        padded = jnp.asarray([prompt + [0] * (192 - len(prompt))])
        expected = np.asarray(jax.nn.log_softmax(rl.forward(model.params, model.config, padded)[0]))
        for of_token, logprobs in zip(others, expected, strict=False):
            assert len(of_token) <= 1 + params.prompt_logprobs
            np.testing.assert_allclose(list(of_token.values()), logprobs[list(of_token)], atol=2e-5)
            best = np.sort(logprobs)[::-1][: params.prompt_logprobs]
            np.testing.assert_allclose(sorted(of_token.values(), reverse=True)[: len(best)], best, atol=2e-5)


def test_priority_and_order_of_arrival(model):
    with rl.Engine(model, **SMALL | {"max_batch_size": 1}) as engine:
        order = [engine.submit([1, 2, 3], GREEDY, priority=priority) for priority in (1, 1, 0)]
        ended = [chunk.index for chunk in engine.run() if chunk.output]
    assert ended == [order[2], order[0], order[1]]


def test_a_long_prompt_does_not_stall_those_that_decode(model):
    with rl.Engine(model, **SMALL | {"prefill_tokens": 16}) as engine:
        short = engine.submit([1, 2], rl.SamplingParams(temperature=0.0, max_tokens=100))
        while not any(chunk.index == short for chunk in engine.step()):
            pass
        engine.submit(list(range(150)), GREEDY)
        made = [sum(len(c.tokens) for c in engine.step() if c.index == short) for _ in range(8)]
    assert all(n >= 1 for n in made)


def test_what_is_refused(model):
    with rl.Engine(model, cache_tokens=128, max_waiting=1, **SMALL) as engine:
        assert engine.sizes.max_length == 128
        with pytest.raises(ValueError, match="prompt 0 has 130 tokens; the engine takes 128"):
            engine.submit([1] * 130)
        with pytest.raises(ValueError, match="token id 509"):
            engine.submit([509])
        engine.submit([1])
        with pytest.raises(rl.EngineFull, match="1 requests wait"):
            engine.submit([1])
        with pytest.raises(RuntimeError, match="warm up before"):
            engine.warm_up()
        engine.step()
        engine.submit([2])  # the first has begun
    for name in ("max_batch_size", "cache_tokens", "max_length", "prefill_tokens"):
        with pytest.raises(ValueError, match=f"{name} is 0; it must be positive"):
            rl.Engine(model, **{name: 0})
    with pytest.raises(ValueError, match="at least 16"):
        rl.Engine(model, prefill_tokens=8)


def test_the_pool_takes_what_memory_leaves(model, monkeypatch):
    """On a device that says how much it has: what weights and the programs leave, in whole pages."""
    each = 2 * 2 * 3 * 20 * 4  # bytes a position: layers, keys and values, heads
    spare = sizes._temporaries(model.config, None, 1000, 64, None)

    class Device:
        platform = "gpu"

        def memory_stats(self):
            return {"bytes_limit": spare + 2000 + 100_000 * each, "bytes_in_use": 2000}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    large = sizes.default_cache_tokens(model, 1000, 512, 64)
    assert large == int(0.95 * 100_000)
    assert sizes.default_cache_tokens(model, 8, 512, 64) == 8 * 512  # no more than all rows can use
    monkeypatch.setattr(Device, "memory_stats", lambda self: {"bytes_limit": 2000, "bytes_in_use": 1000})
    with pytest.raises(ValueError, match="no memory is left for a cache"):
        sizes.default_cache_tokens(model, 8, 512, 64)


def test_closing_ends_what_is_left_and_frees_memory(model):
    before = sum(x.nbytes for x in jax.live_arrays())
    engine = rl.Engine(model, **SMALL)
    request = engine.submit([1, 2, 3], rl.SamplingParams(max_tokens=50))
    engine.step()
    engine.close()
    (chunk,) = engine.step() if engine.has_work else []
    assert (chunk.index, chunk.finish_reason) == (request, "abort")
    assert sum(x.nbytes for x in jax.live_arrays()) <= before


@pytest.mark.parametrize("where", ["decode", "prefill", "read"])
def test_a_failure_ends_those_it_concerns_alone(model, monkeypatch, where):
    """Whatever was on the device is lost, and made again."""
    requests = [([n + 1] * 70, rl.SamplingParams(max_tokens=30, seed=n)) for n in range(3)]
    expected = [output.tokens for output in alone(model, requests)]
    with rl.Engine(model, **SMALL) as engine:
        for request in requests[:2]:
            engine.submit(*request)
        chunks = [chunk for _ in range(3) for chunk in engine.step()]
        engine.submit(*requests[2])

        def fail(*args):
            for leaf in jax.tree.leaves(engine._runner.pages):
                leaf.delete()
            raise RuntimeError("out of memory")

        with monkeypatch.context() as patch:
            name = {"decode": "decode", "prefill": "prefill", "read": None}[where]
            if name:
                patch.setattr(engine._runner, name, fail)
            else:
                patch.setattr(jax, "device_get", fail)
            chunks += engine.step()
        failed = {chunk.index for chunk in chunks if chunk.finish_reason == "error"}
        assert failed == {"prefill": {2}, "decode": {0, 1}, "read": {0}}[where]
        chunks += list(engine.run())
        assert engine.stats().pages_used == 0
    outputs = {chunk.index: chunk.output for chunk in chunks if chunk.output}
    for n in range(3):
        assert (str(outputs[n].error) if n in failed else outputs[n].tokens) == (
            "out of memory" if n in failed else expected[n]
        )


def test_logits_that_are_no_numbers_end_their_request_and_reach_no_other(model):
    """Not even through the pages that it leaves, which others get."""
    embedding = model.params["embedding"].at[7].set(jnp.nan)
    broken = dataclasses.replace(model, params={**model.params, "embedding": embedding})
    others = [(list(range(8, 60)), GREEDY), ([1, 2, 3], GREEDY)]
    expected = [output.tokens for output in alone(model, others)]
    with rl.Engine(broken, **SMALL, cache_tokens=256) as engine:
        engine.submit([7] * 150, GREEDY)
        for request in others:
            engine.submit(*request)
        outputs = [chunk.output for chunk in engine.run() if chunk.output]
    assert {output.finish_reason for output in outputs} == {"error", "length"}
    assert sorted(output.tokens for output in outputs if output.error is None) == sorted(expected)
    for call in (
        lambda: rl.generate(broken, [[1, 2], [7, 7]], GREEDY),
        lambda: rl.generate(broken, [[1, 2], [7, 7]], rl.SamplingParams(prompt_logprobs=0)),
        lambda: rl.generate(model, [[1, 2], [3, 7]], GREEDY, adjust=lambda logits, _: logits.at[1].set(jnp.nan)),
        lambda: rl.beam_search(broken, [[1, 2], [7, 7]]),
    ):
        with pytest.raises(FloatingPointError, match=r"prompt 1: .* in float32, has logits there that are not finite"):
            call()


def test_ctrl_c_loses_nothing(model, monkeypatch):
    requests = [([n + 1] * 5, rl.SamplingParams(max_tokens=30, seed=n)) for n in range(3)]
    expected = [output.tokens for output in alone(model, requests)]
    with rl.Engine(model, **SMALL) as engine:
        for request in requests:
            engine.submit(*request)
        chunks = engine.step() + engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, "decode", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                engine.step()
        chunks += list(engine.run())
    for n, tokens in enumerate(expected):
        assert [token for chunk in chunks if chunk.index == n for token in chunk.tokens] == tokens


def test_chat_messages_are_prompts():
    tokenizer = byte_tokenizer()
    model = dataclasses.replace(tiny_model(tiny_config(vocab_size=256)), tokenizer=tokenizer)
    with rl.Engine(model, **SMALL) as engine, pytest.raises(ValueError, match="chat template"):
        engine.submit([{"role": "user", "content": "hi"}])


def test_many_streams_on_one_event_loop(model):
    requests = requests_for(random.Random(2), 509)[:6]
    expected = one_by_one(model, requests, **SMALL)

    async def read(engine, request, most=None):
        tokens = []
        async for chunk in engine.stream(*request):
            tokens += chunk.tokens
            if most is not None and len(tokens) >= most:
                break
        return tokens

    async def serve():
        async with rl.AsyncEngine(model, **SMALL) as engine:
            with pytest.raises(ValueError, match="token id"):
                await read(engine, ([509], GREEDY))
            leaving = read(engine, ([5] * 20, rl.SamplingParams(max_tokens=150, seed=0)), most=1)
            made = await asyncio.gather(leaving, *(read(engine, request) for request in requests))
            while (stats := await engine.stats()).running:  # who left is aborted
                await asyncio.sleep(0.01)
        return made[1:], stats

    made, stats = asyncio.run(serve())
    assert made == [output.tokens for output in expected]
    assert stats.finished == len(requests) + 1
    assert stats.pages_used == 0
