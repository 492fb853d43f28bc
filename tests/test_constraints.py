"""What may be drawn: allowed tokens, bad words, and masks that a host function makes between two dispatches."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.benchmarks.replay import counted_compilations
from ridgeline.decode.constraints import packed
from tiny import byte_tokenizer, tiny_config, tiny_model

V = 256
TOKENIZER = byte_tokenizer()
TEXTS = [TOKENIZER.decode([token]) for token in range(V)]
GREEDY = rl.SamplingParams(temperature=0.0, max_tokens=20)
DIGITS = "0123456789"
EDGES = {(0, c): 1 for c in DIGITS} | {(1, c): 1 for c in DIGITS} | {(1, "."): 2, (1, ";"): 4, (3, ";"): 4}
EDGES |= {(2, c): 3 for c in DIGITS}


class Number:
    r"""A constraint: the automaton of [0-9]+(\.[0-9])?; over the texts of tokens."""

    def __init__(self):
        self.at = 0

    def walk(self, text):
        at = self.at
        for c in text:
            at = EDGES.get((at, c))
        return at

    def mask(self):
        return np.array([self.walk(text) is not None for text in TEXTS])

    def accept(self, token):
        self.at = self.walk(TEXTS[token])


class Packed(Number):
    def mask(self):
        return packed(super().mask())[:2]  # of 64 tokens; the rest is not allowed


def texts(config=None, **generation):
    return dataclasses.replace(tiny_model(config or tiny_config(vocab_size=V), **generation), tokenizer=TOKENIZER)


@pytest.fixture(scope="module")
def model():
    return texts()


def recomputed(model, prompt, params, seed, allowed):
    """The whole text again for every token, which is one of those that `allowed` has of the output so far."""
    state, plan = rl.make_sampling_state([params], [prompt], [seed], V)
    tokens, output = list(prompt), []
    while len(output) < params.max_tokens and (mask := allowed(output)).any():
        padded = jnp.asarray([tokens + output + [0] * (160 - len(tokens + output))], jnp.int32)
        length = len(prompt) + len(output)
        logits = jnp.where(mask, rl.forward(model.params, model.config, padded)[:, length - 1], -jnp.inf)
        token, _, state = rl.sample(logits, state, jnp.array([length]), plan)
        output.append(int(token[0]))
    return output


def number(output):
    constraint = Number()
    for token in output:
        constraint.accept(token)
    return constraint.mask()


PROMPTS = [[(7 * n + at) % V for at in range(length)] for n, length in enumerate((58, 3, 60, 1, 55, 62))]
MIXED = [
    rl.SamplingParams(temperature=0.0, max_tokens=20, constraint=Number),
    rl.SamplingParams(seed=1, max_tokens=20),
    rl.SamplingParams(seed=2, max_tokens=20, constraint=Packed, temperature=0.7, top_k=8, logprobs=1),
    rl.SamplingParams(temperature=0.0, max_tokens=20, repetition_penalty=1.3),
    rl.SamplingParams(seed=3, max_tokens=20, constraint=Number, presence_penalty=1.0),
    rl.SamplingParams(seed=4, max_tokens=20),
]


def test_a_constraint_is_masking_before_each_token_whatever_the_batch(model):
    expected = [
        recomputed(
            model, prompt, params, params.seed or 0, number if params.constraint else lambda output: np.ones(V, bool)
        )
        for prompt, params in zip(PROMPTS, MIXED, strict=True)
    ]
    outputs = rl.generate(model, PROMPTS, MIXED, max_batch_size=4)
    assert [output.tokens for output in outputs] == expected
    ended = set()
    for output, params in zip(outputs, MIXED, strict=True):
        if params.constraint:
            assert re.fullmatch(r"[0-9]+((\.[0-9])?;|\.?)", output.text)
            assert output.finish_reason == ("stop" if output.text.endswith(";") else "length")
            ended.add(output.finish_reason)
    assert "stop" in ended
    assert len(outputs[2].logprobs) == len(outputs[2].tokens)
    streamed = [[] for _ in PROMPTS]
    for chunk in rl.stream(model, PROMPTS, MIXED, max_batch_size=4):
        streamed[chunk.index] += chunk.tokens
    assert streamed == expected
    several = rl.generate(model, [PROMPTS[4]], dataclasses.replace(MIXED[4], n=2))[0].samples
    second = rl.generate(model, [PROMPTS[4]], dataclasses.replace(MIXED[4], seed=several[1].seed))
    assert [sample.tokens for sample in several] == [outputs[4].tokens, second[0].tokens]


@pytest.mark.parametrize("case", ["few pages", "made anew"])
def test_requests_that_begin_again_are_where_they_were(case):
    """Pages are few, so that rows are preempted; RoPE of the kind "dynamic" makes their output anew."""
    rope = rl.RopeConfig(rotary_dim=20, kind="dynamic" if case == "made anew" else "default", original_max_position=80)
    model = texts(tiny_config(vocab_size=V, layers=(rl.LayerConfig(rope),) * 2))
    options = {"max_batch_size": 4, "max_length": 128, "cache_tokens": 64 * 4, "prefill_tokens": 64}
    alone = []
    for prompt, params in zip(PROMPTS, MIXED, strict=True):
        with rl.Engine(model, prefix_caching=False, whole_batches=True, **options) as engine:
            engine.submit(prompt, params)
            alone += [chunk.output.tokens for chunk in engine.run() if chunk.output]
    with rl.Engine(model, whole_batches=True, **options) as engine:
        for prompt, params in zip(PROMPTS, MIXED, strict=True):
            engine.submit(prompt, params)
        together = {chunk.index: chunk.output for chunk in engine.run() if chunk.output}
        assert engine.stats().preemptions > 0
    assert [together[n].error for n in range(6)] == [None] * 6
    assert [together[n].tokens for n in range(6)] == alone


def test_stop_strings_and_lengths_end_what_is_constrained(model):
    (plain,) = rl.generate(model, [PROMPTS[0]], MIXED[0])
    (cut,) = rl.generate(model, [PROMPTS[0]], dataclasses.replace(MIXED[0], stop=plain.text[1]))
    assert (cut.text, cut.finish_reason) == (plain.text[: plain.text.index(plain.text[1])], "stop")
    (short,) = rl.generate(model, [PROMPTS[0]], dataclasses.replace(MIXED[0], max_tokens=1))
    assert (short.tokens, short.finish_reason) == (plain.tokens[:1], "length")


def test_what_a_constraint_raises_ends_its_request_alone(model):
    class Broken(Number):
        def accept(self, token):
            raise RuntimeError("no such token")

    with rl.Engine(model, max_batch_size=4, max_length=128) as engine:
        suppressed = [token for token, text in enumerate(TEXTS) if text in DIGITS]
        engine.submit(PROMPTS[0], dataclasses.replace(GREEDY, constraint=Broken))
        engine.submit(PROMPTS[1], dataclasses.replace(GREEDY, constraint=Number, suppress_tokens=suppressed))
        engine.submit(PROMPTS[2], GREEDY)
        outputs = {chunk.index: chunk.output for chunk in engine.run() if chunk.output}
    assert [outputs[n].finish_reason for n in range(3)] == ["error", "error", "length"]
    assert str(outputs[0].error) == "no such token"
    assert "which the constraint rules out" in str(outputs[1].error)
    assert outputs[2].tokens == rl.generate(model, [PROMPTS[2]], GREEDY)[0].tokens


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros(V, bool), ValueError, "the constraint of prompt 0 allows no token to begin with"),
        (np.ones(V, np.int32), TypeError, r"mask is int32 \[256\]; it must be bool \[V\] or uint32"),
        (np.ones(9, np.uint32), ValueError, "mask is for 288 tokens; the vocabulary has 256"),
    ],
)
def test_masks_that_are_refused(model, mask, error, message):
    class Given:
        def mask(self):
            return mask

    with pytest.raises(error, match=message):
        rl.stream(model, [[1]], rl.SamplingParams(constraint=Given))


def test_a_mask_may_have_words_past_the_vocabulary(model):
    """llguidance rounds up, and a tokenizer's ids may go on past the model's."""

    class Three:
        def mask(self):
            return np.pad(packed(np.arange(V) == 3), (0, 1))

        def accept(self, token):
            pass

    (output,) = rl.generate(model, [[1]], rl.SamplingParams(constraint=Three, max_tokens=3))
    assert output.tokens == [3, 3, 3]


def test_nothing_is_compiled_after_a_warm_up_that_knows_of_constraints(model):
    with rl.Engine(model, max_batch_size=2, max_length=64, prefill_tokens=16) as engine:
        mix = [GREEDY, dataclasses.replace(GREEDY, constraint=Number)]
        engine.warm_up(sampling=mix)
        with counted_compilations() as compilations:
            for params in mix * 2:
                engine.submit(PROMPTS[1], params)
            list(engine.run())
        assert compilations() == 0


# --- allowed tokens and bad words ---


def test_only_allowed_tokens_are_drawn(model):
    allowed = [3, 60, 200, 201]
    mask = np.isin(np.arange(V), allowed)
    for params in (GREEDY, rl.SamplingParams(seed=5, max_tokens=20, top_k=3), rl.SamplingParams(seed=6, max_tokens=20)):
        given = dataclasses.replace(params, allowed_token_ids=allowed)
        (output,) = rl.generate(model, [PROMPTS[1]], given)
        assert output.tokens == recomputed(model, PROMPTS[1], params, params.seed or 0, lambda output: mask)
    ending = dataclasses.replace(GREEDY, allowed_token_ids=[3], min_tokens=3, stop_token_ids=[3, 4])
    (output,) = rl.generate(model, [PROMPTS[1]], dataclasses.replace(ending, allowed_token_ids=[3, 5]))
    assert output.tokens == [5, 5, 5, *output.tokens[3:]]
    assert not {4} & set(output.tokens)  # not even once min_tokens are there
    with pytest.raises(ValueError, match="all allowed_token_ids of prompt 0 are suppressed"):
        rl.stream(model, [[1]], rl.SamplingParams(allowed_token_ids=[3], suppress_tokens=[3]))


def test_the_last_token_of_a_bad_word_does_not_follow_the_others(model):
    letters = dataclasses.replace(GREEDY, allowed_token_ids=[n for n, text in enumerate(TEXTS) if text.isalnum()])
    (plain,) = rl.generate(model, [PROMPTS[1]], letters)
    first, second, third = plain.tokens[4:7]
    words = [TEXTS[first] + TEXTS[second], TEXTS[third]]
    (output,) = rl.generate(model, [PROMPTS[1]], dataclasses.replace(letters, bad_words=words))

    def allowed(output):
        mask = np.ones(V, bool)
        mask[third] = False
        mask[second] &= output[-1:] != [first]
        return mask

    assert output.tokens == recomputed(model, PROMPTS[1], letters, 0, allowed) != plain.tokens
    assert first in output.tokens
    assert not any(word in output.text for word in words)


def test_bad_words_of_a_checkpoint_may_begin_in_the_prompt():
    prompt = PROMPTS[1]
    (plain,) = rl.generate(texts(), [prompt], GREEDY)
    word = (*prompt[-2:], plain.tokens[0])
    model = texts(bad_words=(word, (V + 3, 1)))
    (output,) = rl.generate(model, [prompt], GREEDY)

    def allowed(output):
        mask = np.ones(V, bool)
        mask[word[-1]] = (prompt + output)[-2:] != prompt[-2:]
        return mask

    assert output.tokens == recomputed(model, prompt, GREEDY, 0, allowed)
    assert output.tokens[0] != plain.tokens[0]
    (of_request,) = rl.generate(texts(), [prompt], dataclasses.replace(GREEDY, bad_words=TOKENIZER.decode(word)))
    assert of_request.tokens[0] == plain.tokens[0]  # which looks at the output alone
