"""SamplingParams refuses what it should, in words that help."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

from ridgeline.decode.sampling.params import SamplingParams

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("error", "fields", "message"),
    [
        (ValueError, {"temperature": NAN}, "temperature is nan; it must be finite and at least 0"),
        (ValueError, {"temperature": -0.1}, "temperature is -0.1"),
        (ValueError, {"temperature": INF}, "temperature is inf"),
        (ValueError, {"temperature": 10**400}, "temperature is 1000"),
        (TypeError, {"temperature": "0.5"}, "temperature is '0.5', a str; it must be a number"),
        (TypeError, {"temperature": True}, "temperature is True, a bool"),
        (TypeError, {"temperature": None}, "temperature is None"),
        (ValueError, {"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        (ValueError, {"top_p": 1.01}, "top_p is 1.01"),
        (ValueError, {"top_p": NAN}, "top_p is nan"),
        (ValueError, {"min_p": -0.01}, r"min_p is -0.01; it must be in \[0, 1\]"),
        (ValueError, {"min_p": 1.01}, "min_p is 1.01"),
        (ValueError, {"top_k": -2}, "top_k is -2; it must be at least 1, or 0"),
        (TypeError, {"top_k": 5.0}, "top_k is 5.0, a float; it must be an integer"),
        (TypeError, {"top_k": True}, "top_k is True, a bool"),
        (TypeError, {"top_k": None}, "top_k is None"),
        (ValueError, {"repetition_penalty": 0.0}, "repetition_penalty is 0.0; it must be finite and above 0"),
        (ValueError, {"repetition_penalty": INF}, "repetition_penalty is inf"),
        (ValueError, {"presence_penalty": 2.1}, r"presence_penalty is 2.1; it must be in \[-2, 2\]"),
        (ValueError, {"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
        (ValueError, {"frequency_penalty": NAN}, "frequency_penalty is nan"),
        (ValueError, {"max_tokens": 0}, "max_tokens is 0; it must be at least 1, or None"),
        (ValueError, {"max_tokens": -3}, "max_tokens is -3"),
        (TypeError, {"max_tokens": 16.0}, "max_tokens is 16.0, a float"),
        (TypeError, {"max_tokens": "16"}, "max_tokens is '16', a str"),
        (ValueError, {"min_tokens": -1}, "min_tokens is -1; it must be at least 0"),
        (ValueError, {"min_tokens": 17}, "min_tokens is 17, above max_tokens 16"),
        (TypeError, {"logprobs": True}, "logprobs is True"),
        (ValueError, {"seed": -1}, r"seed is -1; it must be in \[0, 2\*\*64\)"),
        (ValueError, {"seed": 2**64}, "seed is 18446744073709551616"),
        (TypeError, {"seed": 1.5}, "seed is 1.5"),
        (ValueError, {"logit_bias": {3: NAN}}, r"logit_bias of token 3 is nan; it must be in \[-100, 100\]"),
        (ValueError, {"logit_bias": {3: 100.5}}, "logit_bias of token 3 is 100.5"),
        (ValueError, {"logit_bias": {-3: 1.0}}, "a token id of logit_bias is -3"),
        (TypeError, {"logit_bias": {"3": 1.0}}, "a token id of logit_bias is '3', a str"),
        (TypeError, {"logit_bias": {3: "1"}}, "logit_bias of token 3 is '1'"),
        (TypeError, {"logit_bias": [(3, 1.0)]}, "logit_bias is .*; it must be a mapping"),
        (ValueError, {"stop": ""}, r"stop is \('',\); an empty string"),
        (ValueError, {"stop": ["a", ""]}, r"stop is \('a', ''\); an empty string"),
        (ValueError, {"bad_words": ["a", " "]}, r"bad_words is \('a', ' '\); one of them is blank"),
        (TypeError, {"bad_words": [3]}, r"bad_words is \[3\]; it must be a string"),
        (ValueError, {"n": 0}, "n is 0; it must be at least 1"),
        (ValueError, {"n": 2, "temperature": 0}, "n is 2, and temperature 0.0 gives one text; raise it"),
        (ValueError, {"allowed_token_ids": []}, "allowed_token_ids is empty, which allows no token at all"),
        (ValueError, {"allowed_token_ids": [-1]}, "a token id of allowed_token_ids is -1"),
        (TypeError, {"constraint": "[0-9]+"}, r"constraint is '\[0-9\]\+'; it must be a function that makes"),
        (TypeError, {"stop": 5}, "stop is 5; it must be a string"),
        (TypeError, {"stop": [b"a"]}, r"stop is \[b'a'\]; it must be a string"),
        (ValueError, {"stop_token_ids": [1, -1]}, "a token id of stop_token_ids is -1"),
        (TypeError, {"stop_token_ids": [1.0]}, "a token id of stop_token_ids is 1.0, a float"),
        (TypeError, {"stop_token_ids": [False]}, "a token id of stop_token_ids is False, a bool"),
        (TypeError, {"stop_token_ids": 5}, "stop_token_ids is 5; it must be a sequence"),
        (TypeError, {"stop_token_ids": "12"}, "stop_token_ids is '12'; it must be a sequence"),
        (ValueError, {"suppress_tokens": [-1]}, "a token id of suppress_tokens is -1"),
        (TypeError, {"begin_suppress_tokens": 5}, "begin_suppress_tokens is 5; it must be a sequence"),
        (TypeError, {"ignore_eos": 1}, "ignore_eos is 1; it must be True or False"),
        (TypeError, {"skip_special_tokens": "no"}, "skip_special_tokens is 'no'"),
        (TypeError, {"do_sample": False}, "SamplingParams has no argument 'do_sample'; use temperature, which is 0"),
        (TypeError, {"nonsense": 1}, "SamplingParams has no argument 'nonsense'; it has max_tokens, temperature"),
        (ValueError, {"logprobs": -2}, "logprobs is -2; it must be at least 0, -1 for all tokens"),
        (TypeError, {"include_stop_str_in_output": None}, "include_stop_str_in_output is None"),
    ],
    ids=str,
)
def test_bad_params_are_refused_at_construction(error, fields, message):
    with pytest.raises(error, match=f"^{message}"):
        SamplingParams(**fields)


def test_good_params_at_the_edges():
    params = SamplingParams(
        max_tokens=None,
        temperature=0,
        top_k=np.int64(3),
        top_p=np.float32(0.5),
        min_p=1,
        presence_penalty=-2,
        frequency_penalty=2,
        logit_bias={np.int32(1): -100},
        seed=2**64 - 1,
        stop="a",
        stop_token_ids=(5, 5, 6),
        allowed_token_ids=(5, 6, 6),
        bad_words=["b"],
        constraint=dict,
        min_tokens=99,
    )
    assert (params.temperature, params.top_k, params.top_p, params.logit_bias) == (0.0, 3, 0.5, {1: -100.0})
    assert type(params.top_k) is int
    assert type(params.temperature) is type(params.top_p) is float
    assert (params.stop, params.stop_token_ids, SamplingParams().stop) == (("a",), (5, 6), ())
    assert params.greedy
    assert not SamplingParams(temperature=1e-5).greedy
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 1
    for same in (dataclasses.replace(params), pickle.loads(pickle.dumps(params))):
        assert same == params
        assert hash(same) == hash(params)
    assert params != dataclasses.replace(params, logit_bias={1: -99})


def test_params_against_a_vocabulary():
    params = SamplingParams(logit_bias={9: 1.0}, stop_token_ids=[9], logprobs=10)
    params.validate(10)
    with pytest.raises(ValueError, match=r"stop_token_ids has token ids \[9\]; the vocabulary has 9 tokens"):
        params.validate(9)
    with pytest.raises(ValueError, match=r"logit_bias has token ids \[9\].*ids must be in \[0, 9\)"):
        dataclasses.replace(params, stop_token_ids=None).validate(9)
    with pytest.raises(ValueError, match=r"begin_suppress_tokens has token ids \[9\]"):
        SamplingParams(begin_suppress_tokens=[9]).validate(9)
    with pytest.raises(ValueError, match=r"allowed_token_ids has token ids \[9\]"):
        SamplingParams(allowed_token_ids=[9]).validate(9)
    with pytest.raises(ValueError, match="logprobs is 10; the vocabulary has 9 tokens"):
        SamplingParams(logprobs=10).validate(9)
