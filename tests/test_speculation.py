"""Speculation: whatever a drafter guesses, the tokens are those of plain decoding, and more of them come at once."""

import dataclasses
import functools
import random
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.benchmarks.replay import counted_compilations
from ridgeline.decode.cache import Rows
from ridgeline.decode.engine import drafts
from ridgeline.decode.engine import engine as engines
from ridgeline.decode.sampling.state import make_sampling_state
from ridgeline.decode.speculation.drafter import Drafter, Texts
from ridgeline.decode.speculation.length import DraftLength
from tiny import byte_tokenizer, tiny_config, tiny_model

SMALL = {"max_batch_size": 4, "max_length": 192, "prefill_tokens": 64, "cache_tokens": 64 * 4, "whole_batches": True}
ROPE = rl.RopeConfig(rotary_dim=20)


def target(**rope):
    """One token a byte, a window of 9, and room for 192 tokens."""
    rope = dataclasses.replace(ROPE, **rope)
    config = tiny_config(
        vocab_size=256, max_position=192, layers=(rl.LayerConfig(rope, window=9), rl.LayerConfig(rope))
    )
    return dataclasses.replace(tiny_model(config), tokenizer=byte_tokenizer())


LONG = {"original_max_position": 80, "factor": 4.0}
LONG["short_factor"], LONG["long_factor"] = (1.0,) * 10, tuple(1.0 + n for n in range(10))
TARGETS = {"": target(), "longrope": target(kind="longrope", **LONG), "dynamic": target(kind="dynamic", **LONG)}


@dataclasses.dataclass(frozen=True)
class Mistaken(Drafter):
    """Guesses of another drafter, all of them wrong, or at random some wrong and some left out."""

    drafter: Drafter
    always: bool

    @property
    def tokens(self):
        return self.drafter.tokens

    def bind(self, target):
        params, drafter = self.drafter.bind(target)
        return params, dataclasses.replace(self, drafter=drafter)

    def init_pages(self, *layout):
        return self.drafter.init_pages(*layout)

    def shortened(self, tokens):
        return dataclasses.replace(self, drafter=self.drafter.shortened(tokens)) if tokens else super().shortened(0)

    def read(self, *text):
        return self.drafter.read(*text)

    def propose(self, params, pages, texts, plan, adjust):
        guesses, count, pages = self.drafter.propose(params, pages, texts, plan, adjust)
        positions = texts.rows.lengths[:, None] + jnp.arange(self.tokens)
        chance = (positions * 48271 + guesses * 16807) % 127
        wrong = jnp.where(self.always | (chance < 30), (guesses + 1) % 256, guesses)
        return wrong, count if self.always else chance[:, 0] % (self.tokens + 1), pages


def drafter_of(name, model):
    right = rl.ModelDrafter(model, tokens=3)
    return {
        "right": right,
        "wrong": Mistaken(right, always=True),
        "random": Mistaken(right, always=False),
        "n-gram": rl.NGramDrafter(tokens=5),
    }[name]


def make_requests():
    """Prompts that share beginnings, with every option of sampling; rows that end full too."""
    rng = random.Random(0)
    shared = [rng.randrange(256) for _ in range(128)]
    prompts = [shared[:length] + [rng.randrange(256) for _ in range(n)] for length in (0, 64, 128) for n in (1, 9, 30)]
    asked = [
        {"temperature": 0.0, "logprobs": 2, "max_tokens": None},
        {"seed": 1, "max_tokens": 40},
        {"seed": 2, "temperature": 0.7, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "max_tokens": 30},
        {"seed": 3, "repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logprobs": 0},
        {"temperature": 0.0, "frequency_penalty": 1.0, "min_tokens": 9, "stop_token_ids": list(range(0, 256, 3))},
        {"seed": 4, "logit_bias": {7: 4.0, 9: 3.0}, "suppress_tokens": [3, 4], "prompt_logprobs": 1},
        {"seed": 5, "stop": [" ", "a", "Q"], "logit_bias": {32: 3.0}, "max_tokens": 60},
        {"temperature": 0.0, "bad_words": ["ab", "cd"], "logprobs": 1},  # asked before each token: no drafts
        {"seed": 6, "allowed_token_ids": [65, 66, 67], "max_tokens": 30},
    ]
    return [(prompt, rl.SamplingParams(**params)) for prompt, params in zip(prompts, asked, strict=True)]


REQUESTS = make_requests()


@functools.cache
def plain(kind):
    """Each request alone, without a drafter."""
    outputs = []
    with rl.Engine(TARGETS[kind], **SMALL) as engine:
        for request in REQUESTS:
            engine.submit(*request)
            outputs += [chunk.output for chunk in engine.run() if chunk.output]
    return outputs


def check(output, expected):
    if output.error is not None:
        raise output.error
    for name in ("tokens", "text", "finish_reason", "stop_reason"):
        assert getattr(output, name) == getattr(expected, name)
    assert 0 <= output.accepted <= output.drafted
    if expected.logprobs is not None:
        assert [entry.rank for entry in output.logprobs] == [entry.rank for entry in expected.logprobs]
        for entry, other in zip(output.logprobs, expected.logprobs, strict=True):
            assert list(entry.top) == list(other.top)
            np.testing.assert_allclose([entry.logprob, *entry.top.values()], [other.logprob, *other.top.values()], 1e-4)


def play(engine, rng, kind="", some=range(9)):
    """Requests that come at random times, each checked as it ends; tokens that were drafted, and accepted."""
    places, to_come, drafted, accepted = {}, rng.sample(some, len(some)), 0, 0
    while to_come or engine.has_work:
        while to_come and rng.random() < 0.4:
            place = to_come.pop()
            places[engine.submit(*REQUESTS[place], priority=rng.choice((0, 0, 1)))] = place
        for chunk in engine.step():
            if chunk.output:
                check(chunk.output, plain(kind)[places[chunk.index]])
                drafted, accepted = drafted + chunk.output.drafted, accepted + chunk.output.accepted
    assert engine.stats().pages_used == 0
    return drafted, accepted


def pick_at_random(monkeypatch, engine, rng):
    """How many tokens each round drafts."""
    monkeypatch.setattr(engine._drafts, "pick", lambda rows: rng.choice(engine._drafts.sizes))


@pytest.mark.parametrize(
    ("kind", "name"), [*(("", name) for name in ("right", "wrong", "random", "n-gram")), ("longrope", "random")]
)
def test_any_mix_gives_the_tokens_of_plain_decoding(monkeypatch, kind, name):
    """In chunks, with shared beginnings, pages so few that rows are preempted, and drafts of changing lengths."""
    model, rng = TARGETS[kind], random.Random(1)
    assert {output.finish_reason for output in plain(kind)} == {"stop", "length"}
    with rl.Engine(model, drafter=drafter_of(name, model), **SMALL) as engine:
        pick_at_random(monkeypatch, engine, rng)
        counts = [play(engine, rng, kind) for _ in range(3)]
        stats = engine.stats()
    assert stats.preemptions > 0
    assert stats.prefix_hit_rate > 0.05
    drafted, accepted = map(sum, zip(*counts, strict=True))
    assert drafted > 100
    if name == "right":
        assert accepted == drafted
    else:
        assert (accepted == 0) == (name == "wrong")


def test_keys_that_depend_on_the_length_take_no_drafts():
    model = TARGETS["dynamic"]
    with rl.Engine(model, drafter=drafter_of("right", model), **SMALL) as engine:
        assert play(engine, random.Random(2), "dynamic") == (0, 0)


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, {"seed": 8, "presence_penalty": 0.7}])
def test_a_drafter_that_is_right_gives_the_most_tokens_a_round(sampling):
    model = TARGETS[""]
    params = rl.SamplingParams(max_tokens=1 + 6 * 5, **sampling)  # the first comes with the prompt
    (expected,) = rl.generate(model, [[1, 2, 3]], params)
    (output,) = rl.generate(model, [[1, 2, 3]], params, drafter=rl.ModelDrafter(model, tokens=4))
    check(output, expected)
    assert (output.drafted, output.accepted) == (6 * 4, 6 * 4)


def test_nothing_is_compiled_after_warm_up(monkeypatch):
    """Of one plan, with and without masks, whatever the length of drafts."""
    model, rng, some = TARGETS[""], random.Random(3), (0, 3, 7)
    options = SMALL | {"max_batch_size": 1, "whole_batches": False, "drafter": rl.ModelDrafter(model, tokens=1)}
    plain("")
    with rl.Engine(model, **options) as engine:
        engine.warm_up(sampling=[REQUESTS[place][1] for place in some])
        pick_at_random(monkeypatch, engine, rng)
        with counted_compilations() as compilations:
            for _ in range(3):
                play(engine, rng, some=some)
        assert compilations() == 0


def test_batch_invariant_in_bfloat16():
    """Each request as alone on such an engine, to the bit, preempted ones too."""
    config = dataclasses.replace(TARGETS[""].config, dtype="bfloat16")
    model = dataclasses.replace(tiny_model(config), tokenizer=byte_tokenizer())
    options = SMALL | {"batch_invariant": True, "drafter": drafter_of("random", model)}
    expected = []
    with rl.Engine(model, **options) as engine:
        for request in REQUESTS:
            engine.submit(*request)
            expected += [chunk.output for chunk in engine.run() if chunk.output]
    with rl.Engine(model, **options) as engine:
        for seed in range(3):
            order = random.Random(seed).sample(range(len(REQUESTS)), len(REQUESTS))
            places = {engine.submit(*REQUESTS[place]): place for place in order}
            for output, place in ((c.output, places[c.index]) for c in engine.run() if c.output):
                assert (output.tokens, output.logprobs) == (expected[place].tokens, expected[place].logprobs)
        stats = engine.stats()
    assert stats.preemptions > 0
    assert sum(stats.speculation.accepted) > 0


def test_drafted_tokens_have_the_distribution_of_the_model():
    """Pearson's test of all pairs of the two tokens after a prompt: 15 degrees of freedom, of 1 in 1,000."""
    model, tokens, count = TARGETS[""], jnp.arange(65, 69), 300
    prompt, sampling = [1, 2, 3], rl.SamplingParams(max_tokens=4)
    asked = [dataclasses.replace(sampling, seed=seed) for seed in range(count)]

    def four(logits, context):
        return jnp.full_like(logits, -jnp.inf).at[:, tokens].set(logits[:, tokens] / 2)

    drafter = drafter_of("random", model)
    outputs = rl.generate(model, [prompt] * count, asked, drafter=drafter, adjust=four, max_batch_size=64)
    assert 0.2 < sum(output.accepted for output in outputs) / sum(output.drafted for output in outputs) < 0.9
    texts = jnp.asarray([[*prompt, token] for token in tokens.tolist()])
    logits = np.asarray(rl.forward(model.params, model.config, texts)[:, 2:, tokens]) / 2
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = count * chances[0, 0][:, None] * chances[:, 1]
    seen = np.zeros_like(expected)
    np.add.at(seen, tuple(np.array([output.tokens[:2] for output in outputs]).T - 65), 1)
    assert expected.min() > 4
    assert ((seen - expected) ** 2 / expected).sum() < 37.7


@pytest.mark.parametrize(
    ("chance", "seconds", "best"),
    [
        (0.9, {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, 8),
        (0.5, {0: 1.0, 1: 1.2, 2: 1.3, 4: 1.7, 8: 2.5}, 2),
        (0.9, {0: 1.0, 1: 2.0, 2: 3.0, 4: 5.0, 8: 9.0}, 0),
        (0.0, {0: 1.0, 1: 1.1, 2: 1.2, 4: 1.4, 8: 1.8}, 0),
    ],
)
def test_the_fastest_number_of_drafts_is_found_and_kept(chance, seconds, best):
    rng, length, picked = np.random.default_rng(0), DraftLength(8), []
    for _ in range(400):
        size = length.pick(4)
        right = np.cumprod(rng.random((16, size)) < chance, axis=1).sum(axis=1)
        slow = 30.0 if len(picked) % 40 == 0 else 1.0  # whoever reads the tokens keeps it waiting
        length.measured(4, size, slow * seconds[size], right)
        picked.append(size)
    assert picked[:2] == [8, 8]
    assert picked[200:].count(best) > 0.85 * 200


def test_the_engine_stops_where_drafts_do_not_pay(monkeypatch):
    """By a clock that goes by the tokens that are checked; and begins again where they do."""
    model, clock, done = TARGETS[""], types.SimpleNamespace(now=0.0, free=0.0), {}
    clock.perf_counter = lambda: clock.now

    def device_get(sampled, get=jax.device_get):
        clock.now = max(clock.now, done.pop(id(sampled), clock.now))
        return get(sampled)

    monkeypatch.setattr(jax, "device_get", device_get)
    params = rl.SamplingParams(max_tokens=180, temperature=0.0, ignore_eos=True)
    (expected,) = rl.generate(model, [[1, 2, 3]], params)
    for name, cost, best in (("wrong", 0.1, 0), ("right", 0.1, 3), ("right", 2.0, 0)):
        with rl.Engine(model, drafter=drafter_of(name, model), **SMALL | {"max_batch_size": 1}) as engine:
            picked, decode = [], engine._runner.decode

            def timed(rows, steps, plan, masks, drafted, cost=cost, decode=decode, picked=picked):
                out = decode(rows, steps, plan, masks, drafted)
                clock.free = max(clock.free, clock.now) + steps * (1 + cost * drafted)
                done[id(out[0])] = clock.free
                picked.append(drafted)
                return out

            monkeypatch.setattr(engine._runner, "decode", timed)
            for module in (drafts, engines):
                monkeypatch.setattr(module, "time", clock)
            for _ in range(6):
                engine.submit([1, 2, 3], params)
                (output,) = [chunk.output for chunk in engine.run() if chunk.output]
                assert output.tokens == expected.tokens
        assert picked[0] == 3
        assert picked[-40:].count(best) > 30


def follows(text, tokens, longest):
    """What prompt lookup guesses, in plain Python."""
    for length in range(min(longest, len(text) - 1), 0, -1):
        for end in range(len(text) - 2, length - 2, -1):
            if text[end - length + 1 : end + 1] == text[-length:]:
                period = len(text) - 1 - end
                return [text[end + 1 + n % period] for n in range(tokens)]
    return None


def test_n_grams_are_looked_up_as_in_plain_python():
    rng, (B, C) = random.Random(3), (200, 40)
    drafter = rl.NGramDrafter(tokens=6, longest=3)
    texts = [[rng.randrange(rng.choice((2, 4, 20))) for _ in range(rng.randint(1, C))] for _ in range(B)]
    history = np.array([text + [rng.randrange(3) for _ in range(C - len(text))] for text in texts], np.int32)
    lengths = np.array([len(text) - 1 for text in texts], np.int32)
    sampling, plan = make_sampling_state([rl.SamplingParams()] * B, None, [0] * B, 20)
    rows = Rows(jnp.asarray(lengths), None, None)
    guesses, count, _ = drafter.propose(None, None, Texts(rows, jnp.asarray(history), None, sampling), plan, None)
    expected = [follows(text, 6, 3) for text in texts]
    assert 0 < expected.count(None) < B / 2
    for row, guess in enumerate(expected):
        assert count[row] == (0 if guess is None else 6)
        assert guess is None or guesses[row].tolist() == guess


def seven_again(logits, context):
    """Every seventh token is the same."""
    return logits.at[jnp.arange(len(logits)), 40 + context.positions % 7].add(1e4)


def test_n_grams_in_a_text_that_repeats(model):
    asked = {"sampling": rl.SamplingParams(max_tokens=100, seed=1), "adjust": seven_again}
    (expected,), (output,) = (
        rl.generate(model, [[1]], drafter=drafter, **asked) for drafter in (None, rl.NGramDrafter())
    )
    assert output.tokens == expected.tokens == [40 + n % 7 for n in range(1, 101)]
    assert output.accepted > 70


def test_the_bundled_pair(bundled):
    draft = rl.load_model("bundled-draft", dtype="float32")
    asked = [
        rl.SamplingParams(max_tokens=50, temperature=0.0),
        rl.SamplingParams(max_tokens=50, temperature=0.8, seed=2),
    ]
    texts = ["Once upon a time", "The old king"]
    for output, expected in zip(
        rl.generate(bundled, texts, asked, drafter=rl.ModelDrafter(draft)),
        rl.generate(bundled, texts, asked),
        strict=True,
    ):
        check(output, expected)
        assert output.accepted > 0.15 * output.drafted


def test_what_is_refused(model, bundled):
    for tokens in (0, 16):
        for drafter in (lambda tokens: rl.ModelDrafter(model, tokens), rl.NGramDrafter):
            with pytest.raises(ValueError, match=f"tokens is {tokens}; a drafter guesses 1 to 15"):
                drafter(tokens)
    with pytest.raises(ValueError, match="longest is 0"):
        rl.NGramDrafter(longest=0)
    with pytest.raises(ValueError, match="target tiny has a vocabulary of 509 and draft tiny of 256, and not both"):
        rl.Engine(model, drafter=rl.ModelDrafter(TARGETS[""]))
    with pytest.raises(ValueError, match="target story and draft tiny have other tokens"):
        rl.Engine(bundled, drafter=rl.ModelDrafter(TARGETS[""]))
    narrow = tiny_model(tiny_config(layers=(rl.LayerConfig(ROPE, window=9),)))
    with pytest.raises(ValueError, match="a layer that sees all positions, and target tiny keeps 9"):
        rl.Engine(narrow, drafter=rl.ModelDrafter(model))
