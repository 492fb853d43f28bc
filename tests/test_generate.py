"""`generate` and `stream`: batches, ends, seeds, long prompts, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import normalizers

import ridgeline as rl
from ridgeline.benchmarks.replay import counted_compilations
from ridgeline.decode import buckets
from ridgeline.decode.engine import slots
from ridgeline.decode.generate import warm_up
from ridgeline.model.generation import GenerationDefaults
from ridgeline.model.params import abstract_params
from tiny import byte_tokenizer, tiny_config, tiny_model

rng = np.random.default_rng(3)
PROMPTS = [rng.integers(0, 509, n).tolist() for n in (5, 1, 40, 17, 9)]
GREEDY = rl.SamplingParams(temperature=0.0, max_tokens=20)


def greedy_by_forward(model, prompt, count):
    """The slow way: the whole sequence again for every token, at one padded length."""
    tokens = list(prompt)
    for _ in range(count):
        padded = jnp.asarray([tokens + [0] * (64 - len(tokens))], jnp.int32)
        tokens.append(int(rl.forward(model.params, model.config, padded)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def texts():
    """A model of bytes, so that stop strings and texts can be tried."""
    return dataclasses.replace(tiny_model(tiny_config(vocab_size=256)), tokenizer=byte_tokenizer())


def test_a_ragged_batch_decodes_greedily_like_forward(model):
    outputs = rl.generate(model, PROMPTS, GREEDY)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output.prompt_tokens == prompt
        assert output.tokens == greedy_by_forward(model, prompt, 20)
        assert (output.finish_reason, output.stop_reason, output.text) == ("length", None, None)


def test_a_seed_gives_the_same_tokens_alone_and_in_any_batch(model):
    params = [
        rl.SamplingParams(seed=7, max_tokens=20),
        rl.SamplingParams(seed=8, max_tokens=13, top_k=40, temperature=0.7),
        rl.SamplingParams(seed=7, max_tokens=20, top_p=0.9, repetition_penalty=1.2, min_tokens=3),
        GREEDY,
        rl.SamplingParams(seed=9, max_tokens=5, logit_bias={3: 5.0}, logprobs=2),
    ]
    together = rl.generate(model, PROMPTS, params)
    reversed_ = rl.generate(model, PROMPTS[::-1], params[::-1], max_batch_size=2)[::-1]
    for i, (prompt, own) in enumerate(zip(PROMPTS, params, strict=True)):
        (alone,) = rl.generate(model, [prompt], own)
        assert alone.tokens == together[i].tokens == reversed_[i].tokens
        assert len(alone.tokens) == own.max_tokens


def test_without_a_seed_each_call_draws_anew_and_says_its_seed(model):
    params = rl.SamplingParams(max_tokens=20)
    first, second = (rl.generate(model, [PROMPTS[0]], params)[0] for _ in range(2))
    assert first.tokens != second.tokens
    (again,) = rl.generate(model, [PROMPTS[0]], dataclasses.replace(params, seed=first.seed))
    assert again.tokens == first.tokens


def test_one_prompt_is_a_list_of_one(texts):
    texts.tokenizer.chat_templates["default"] = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
    chat = [{"role": "user", "content": "hi"}]
    for one in ([1, 2, 3], np.array([1, 2, 3]), "hi", chat):
        alone, listed = rl.generate(texts, one, GREEDY), rl.generate(texts, [one], GREEDY)
        assert [output.tokens for output in alone] == [output.tokens for output in listed]
    assert alone[0].prompt_tokens == texts.tokenizer.encode("userhi")
    assert [len(rl.score(texts, one)) for one in ([1, 2, 3], "hi")] == [1, 1]
    assert rl.evaluate(texts, [1, 2, 3]).tokens == 2


def test_a_text_that_becomes_no_tokens_is_refused_by_its_number(texts):
    backend = byte_tokenizer().backend
    backend.normalizer = normalizers.Strip()
    blank = dataclasses.replace(texts, tokenizer=rl.Tokenizer(backend))
    for prompts in ("  \n", ["a", "  "]):
        with pytest.raises(ValueError, match=r"prompt \d has no tokens: the tokenizer makes none of"):
            rl.stream(blank, prompts, GREEDY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 5}, "generate has no argument 'max_new_tokens'; use max_tokens"),
        ({"temperature": 0}, r"use sampling, with SamplingParams\(temperature=\.\.\.\)"),
        ({"nonsense": 0}, "generate has no argument 'nonsense'; it has model, prompts, sampling"),
        ({"residual": len}, "generate: residual is called with 2 arguments"),
    ],
)
def test_arguments_of_others_are_answered_with_what_serves(model, arguments, message):
    with pytest.raises(TypeError, match=message):
        rl.generate(model, [1, 2], **arguments)


def test_minus_one_log_probability_is_that_of_every_token(texts):
    (output,) = rl.generate(texts, [1, 2], rl.SamplingParams(max_tokens=1, logprobs=-1))
    assert len(output.logprobs[0].top) == 256


def test_stream_yields_what_generate_returns(model, capsys):
    expected = rl.generate(model, PROMPTS, GREEDY)
    tokens, outputs, sizes = [[] for _ in PROMPTS], {}, []
    for chunk in rl.stream(model, PROMPTS, GREEDY, max_batch_size=4):
        tokens[chunk.index] += chunk.tokens
        sizes.append(len(chunk.tokens))
        assert (chunk.output is None) == (chunk.finish_reason is None)
        if chunk.output is not None:
            outputs[chunk.index] = chunk.output
    assert tokens == [o.tokens for o in expected] == [outputs[i].tokens for i in range(len(PROMPTS))]
    assert sizes[0] == 1  # the first token does not wait for a block
    assert max(sizes) == buckets.DECODE_STEPS
    seen = []
    rl.generate(model, PROMPTS[:1], GREEDY, callback=seen.append, progress=True)
    shown = capsys.readouterr().err
    assert shown.startswith("\r  0%")  # before anything is compiled
    assert "1/1" in shown
    assert "20 tokens" in shown
    assert [token for chunk in seen for token in chunk.tokens] == expected[0].tokens


def test_end_of_sequence_and_stop_tokens(model):
    (plain,) = rl.generate(model, [PROMPTS[0]], GREEDY)
    stop = plain.tokens[9]
    end = plain.tokens.index(stop) + 1
    (stopped,) = rl.generate(model, [PROMPTS[0]], dataclasses.replace(GREEDY, stop_token_ids=[stop]))
    assert (stopped.tokens, stopped.finish_reason, stopped.stop_reason) == (plain.tokens[:end], "stop", stop)
    with_eos = dataclasses.replace(model, generation=GenerationDefaults(eos_token_ids=(stop,)))
    assert rl.generate(with_eos, [PROMPTS[0]], GREEDY)[0].tokens == plain.tokens[:end]
    ignoring = dataclasses.replace(GREEDY, ignore_eos=True)
    assert rl.generate(with_eos, [PROMPTS[0]], ignoring)[0].tokens == plain.tokens
    at_least = dataclasses.replace(GREEDY, min_tokens=20)
    (longer,) = rl.generate(with_eos, [PROMPTS[0]], at_least)
    assert len(longer.tokens) == 20
    assert stop not in longer.tokens[:-1]


def test_stop_strings(texts):
    greedy = dataclasses.replace(GREEDY, max_tokens=30)
    (plain,) = rl.generate(texts, "hello", greedy)
    stop = plain.text[6:8]
    (stopped,) = rl.generate(texts, "hello", dataclasses.replace(greedy, stop=stop))
    assert stopped.text == plain.text[: plain.text.index(stop)]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    streamed = "".join(chunk.text for chunk in rl.stream(texts, "hello", dataclasses.replace(greedy, stop=stop)))
    assert streamed == stopped.text


def test_logprobs_are_those_of_forward(model):
    params = dataclasses.replace(GREEDY, max_tokens=6, logprobs=3)
    (output,) = rl.generate(model, [PROMPTS[3]], params)
    sequence = PROMPTS[3] + output.tokens
    logits = np.asarray(rl.forward(model.params, model.config, jnp.asarray([sequence])))[0].astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for i, entry in enumerate(output.logprobs):
        row = logprobs[len(PROMPTS[3]) - 1 + i]
        assert entry.token == output.tokens[i]
        assert (entry.rank, list(entry.top)) == (1, np.argsort(-row)[:3].tolist())
        np.testing.assert_allclose([entry.logprob, *entry.top.values()], row[[entry.token, *entry.top]], atol=1e-4)


def test_a_long_prompt_is_prefilled_in_chunks(monkeypatch, model):
    long = rng.integers(0, 509, 50).tolist()
    expected = rl.generate(model, [long, PROMPTS[0]], GREEDY)
    monkeypatch.setattr(buckets, "PREFILL_CHUNK", 16)
    before = rl.prefill._cache_size()
    chunked = rl.generate(model, [long, PROMPTS[0]], GREEDY)
    assert [o.tokens for o in chunked] == [o.tokens for o in expected]
    assert rl.prefill._cache_size() - before <= 2  # 16, 16, 16, 2: all run in the bucket of 16, of two rows and of one


def test_generation_ends_at_the_longest_sequence(model):
    short = dataclasses.replace(model, config=model.config.replace(max_position=48))
    (output,) = rl.generate(short, [PROMPTS[2]], rl.SamplingParams(temperature=0.0, max_tokens=None))
    assert (len(output.tokens), output.finish_reason) == (8, "length")
    assert output.tokens == greedy_by_forward(model, PROMPTS[2], 8)


def test_warm_up_leaves_nothing_to_compile():
    model = tiny_model(tiny_config(vocab_size=400))
    prompts, params = [list(range(70)), [4]], rl.SamplingParams(seed=1, n=2, max_tokens=20)
    warm_up(dataclasses.replace(model, params=abstract_params(model.config)), prompts, params)
    with counted_compilations() as compilations:
        rl.generate(model, prompts, params)
    assert compilations() == 0


def test_a_changing_mix_of_requests_takes_three_programs():
    model = tiny_model(tiny_config(vocab_size=300))
    mix = [{"temperature": t, "top_k": k, "top_p": p} for t in (0, 1) for k in (0, 3) for p in (1, 0.9)] + [
        {"min_p": 0.1},
        {"logprobs": 0},
        {"logprobs": 20, "temperature": 0},
        {"min_tokens": 2},
        {"presence_penalty": 1.0},
        {"repetition_penalty": 1.2, "top_p": 0.5},
        {"logit_bias": {3: 1.0}, "top_k": 280},
    ]
    counts = slots.decode_slots._cache_size(), slots.enter_slots._cache_size()
    for params in mix:
        rl.generate(model, [[1, 2, 3], [4]], [rl.SamplingParams(seed=1, max_tokens=3, **params), GREEDY])
    assert slots.decode_slots._cache_size() - counts[0] == 3
    assert slots.enter_slots._cache_size() - counts[1] <= 3  # others may have compiled one


def test_shapes_fall_in_few_buckets():
    assert {buckets.batch_bucket(n) for n in range(1, 33)} == {1, 2, 4, 8, 16, 32}
    assert {buckets.prefill_bucket(n) for n in range(1, 5000)} == {16, 32, 64, 128, 256, 512, 1024}
    lengths = [buckets.cache_bucket(n) for n in range(1, 20_000)]
    assert all(bucket >= n for n, bucket in enumerate(lengths, 1))
    assert len(set(lengths)) <= 12


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[]], GREEDY, "prompt 0 is empty"),
        ([[1], ""], GREEDY, "prompt 1 is empty"),
        ([[1, 509]], GREEDY, "token id 509; the vocabulary is 0 to 508"),
        ([[-1]], GREEDY, "token id -1"),
        ([[1] * 512], GREEDY, "prompt 0 has 512 tokens; the model takes 512"),
        (["hi"], GREEDY, "no tokenizer"),
        ([[1]], rl.SamplingParams(stop="x"), "stop strings need a tokenizer"),
        ([[1], [2]], [GREEDY], "2 prompts and 1 SamplingParams"),
        ([[1]], rl.SamplingParams(stop_token_ids=[600]), "stop_token_ids has token ids"),
    ],
)
def test_bad_requests_are_refused_before_device_work(model, prompts, params, message):
    with pytest.raises(ValueError, match=message):
        rl.stream(model, prompts, params)  # not even iterated


@pytest.mark.parametrize("call", [rl.stream, warm_up])
def test_batches_of_nothing_are_refused(model, call):
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        call(model, [[1]], GREEDY, max_batch_size=0)


def test_no_prompts_no_outputs(model):
    assert rl.generate(model, [], GREEDY) == []


LONGROPE = rl.RopeConfig(
    20,
    kind="longrope",
    original_max_position=24,
    short_factor=tuple(1 + i / 10 for i in range(10)),
    long_factor=tuple(4.0 + i for i in range(10)),
)


@pytest.mark.parametrize("lengths", [(5, 23), (24, 21), (24, 30)], ids=str)
def test_longrope_takes_the_factors_of_the_length_that_a_row_has(lengths):
    """Reading the whole text again at each step, as `forward` does, is what transformers does where a row crosses."""
    model = tiny_model(tiny_config(layers=(rl.LayerConfig(LONGROPE),) * 2))
    prompts = [rng.integers(0, 509, n).tolist() for n in lengths]

    @jax.jit
    def likeliest(tokens, length):
        x, _ = rl.transformer(model.params, model.config, tokens, contexts=length[None])
        return rl.unembed(model.params, model.config, x)[0, length - 1].argmax()

    for max_tokens in (12, 40):
        outputs = rl.generate(model, prompts, rl.SamplingParams(max_tokens=max_tokens, temperature=0.0))
        for prompt, output in zip(prompts, outputs, strict=True):
            text = jnp.pad(jnp.array([prompt + output.tokens]), ((0, 0), (0, 80 - len(prompt) - len(output.tokens))))
            for n, token in enumerate(output.tokens):
                assert token == likeliest(text, jnp.int32(len(prompt) + n))
