"""generation_config.json and what else a checkpoint's files say of its texts, held by a model that makes a chain."""

import dataclasses
import json

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

import ridgeline as rl
from checkpoints import LLAMA, refused, save, save_chain
from ridgeline.decode.prompts import default_sampling
from ridgeline.model.generation import GenerationDefaults, generation_defaults
from ridgeline.model.loading import load_model

WORDS = ["<unk>", "<|endoftext|>", "<|im_end|>", "▁hello", "▁yes", "▁no", "▁maybe"]
HELLO, YES, NO, MAYBE = 3, 4, 5, 6
END, IM_END = 1, 2


def chain(directory, *words: int, generation: dict | None = None, tokenizer: dict | None = None, **hf):
    """A model that says the words after "hello", and the last one for ever."""
    after = dict(zip((HELLO, *words), (*words, words[-1]), strict=True))
    bare = {key: value for key, value in LLAMA.items() if key != "eos_token_id"}
    save_chain(directory, after, bare | hf)
    backend = Backend(models.WordLevel({word: id for id, word in enumerate(WORDS)}, "<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.add_special_tokens(WORDS[1:3])
    backend.save(str(directory / "tokenizer.json"))
    for name, content in (("generation_config", generation), ("tokenizer_config", tokenizer)):
        if content is not None:
            (directory / f"{name}.json").write_text(json.dumps(content))
    return load_model(directory)


def said(model, **params):
    output = rl.generate(model, "hello", rl.SamplingParams(**{"max_tokens": 6, "temperature": 0.0} | params))[0]
    return output.text, output.finish_reason


# --- where texts end ---


@pytest.mark.parametrize(
    ("hf", "generation"),
    [({}, None), ({"eos_token_id": END}, None), ({}, {"eos_token_id": END}), ({"eos_token_id": END}, {})],
)
def test_the_tokenizers_end_is_an_end(tmp_path, hf, generation):
    model = chain(tmp_path, YES, IM_END, NO, tokenizer={"eos_token": "<|im_end|>"}, generation=generation, **hf)
    assert said(model) == (" yes", "stop")
    assert said(model, ignore_eos=True) == (" yes no no no no", "length")


def test_ends_of_all_files_count(tmp_path):
    model = chain(tmp_path, YES, END, NO, eos_token_id=[END], generation={"eos_token_id": [IM_END, NO]})
    assert model.generation.eos_token_ids == (IM_END, NO, END)
    assert said(model) == (" yes", "stop")


def test_stop_strings_of_the_file(tmp_path):
    model = chain(tmp_path, YES, NO, generation={"stop_strings": ["es"]})
    assert said(model) == (" y", "stop")
    assert said(model, ignore_eos=True)[1] == "length"
    assert said(chain(tmp_path, YES, NO, generation={"stop_strings": "no"}))[0] == " yes "


def test_a_special_token_as_a_stop_string(tmp_path):
    model = chain(tmp_path, YES, IM_END, NO)
    assert said(model, stop="<|im_end|>") == (" yes", "stop")
    assert said(model)[1] == "length"


# --- what is never made ---


@pytest.mark.parametrize("never", [{"suppress_tokens": [YES]}, {"bad_words_ids": [[YES]]}, {"suppress_tokens": YES}])
def test_tokens_that_are_never_made(tmp_path, never):
    model = chain(tmp_path, YES, NO, generation=never)
    assert "yes" not in said(model)[0]
    assert "yes" not in said(model, logit_bias={YES: 100.0}, temperature=1.0, seed=3)[0]


def test_words_of_several_tokens_that_are_never_made(tmp_path):
    plain = said(chain(tmp_path, YES, NO))[0]
    assert " yes no" in plain
    assert " yes no" not in said(chain(tmp_path, YES, NO, generation={"bad_words_ids": [[YES, NO], [YES, NO, NO]]}))[0]


def test_tokens_that_are_not_made_first(tmp_path):
    model = chain(tmp_path, YES, NO, generation={"begin_suppress_tokens": [NO]})
    assert said(model)[0] == " yes no no no no no"
    assert "yes" not in said(chain(tmp_path, YES, NO, generation={"begin_suppress_tokens": YES}), max_tokens=1)[0]


# --- what is said ---


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ({"num_beams": 4}, "num_beams"),
        ({"no_repeat_ngram_size": 3, "typical_p": 0.9}, "no_repeat_ngram_size, typical_p"),
        ({"forced_eos_token_id": 3}, "forced_eos_token_id"),
        ({"temprature": 0.5}, "temprature"),
    ],
)
def test_what_is_not_read_is_said(tmp_path, stated, named):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    with pytest.warns(UserWarning, match=rf"generation_config\.json: {named} not read here") as told:
        load_model(tmp_path)
    assert len(told) == 1


def test_what_changes_nothing_is_not_said(tmp_path, recwarn):
    save(tmp_path)
    stated = {"_from_model_config": True, "transformers_version": "5.0", "num_beams": 1, "length_penalty": 1.0}
    stated |= {"use_cache": True, "max_length": 4096, "forced_eos_token_id": None, "do_sample": True, "typical_p": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    load_model(tmp_path)
    assert not recwarn.list


def test_fewer_tokens_than_asked_for_are_said(tmp_path):
    model = chain(tmp_path, YES, NO, max_position_embeddings=8)
    with pytest.warns(UserWarning, match="prompt 0 has 1 tokens of the 8 that the model takes: it ends after 7 new"):
        assert len(rl.generate(model, "hello", rl.SamplingParams(max_tokens=20))[0].tokens) == 7


# --- the defaults of sampling ---


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (None, GenerationDefaults((2,), 1)),
        ({"eos_token_id": [5, 7], "pad_token_id": 3}, GenerationDefaults((5, 7, 2), 1, 3)),
        ({"eos_token_id": 9, "bos_token_id": 8}, GenerationDefaults((9, 2), 8)),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": 0, "repetition_penalty": 1.1},
            GenerationDefaults((2,), 1, None, 0.6, 0.9, 20, 0.0, 1.1),
        ),
        ({"do_sample": False, "temperature": 0.6, "top_k": None}, GenerationDefaults((2,), 1, temperature=0.0)),
        ({"pad_token_id": -1, "top_k": 50.0}, GenerationDefaults((2,), 1, top_k=50)),
        ({"max_new_tokens": 64}, GenerationDefaults((2,), 1, max_tokens=64)),
    ],
)
def test_generation_defaults(tmp_path, stated, expected):
    save(tmp_path)
    if stated is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    assert load_model(tmp_path).generation == expected == generation_defaults(tmp_path)


def test_default_sampling(model):
    asking = dataclasses.replace(model, generation=GenerationDefaults(top_k=3, max_tokens=64, temperature=0.5))
    assert default_sampling(asking, top_k=4) == rl.SamplingParams(top_k=4, max_tokens=64, temperature=0.5)


@pytest.mark.parametrize(
    ("stated", "pattern"),
    [
        (
            {"eos_token_id": "</s>"},
            r"generation_config\.json: eos_token_id is '</s>', expected a whole number from -1",
        ),
        ({"eos_token_id": [1, True]}, r"eos_token_id\[1\] is True"),
        ({"top_p": 1.5}, r"generation_config\.json: top_p is 1\.5, expected a number above 0 up to 1"),
        ({"top_p": 0.0}, r"generation_config\.json: top_p is 0\.0, expected a number above 0"),
        ({"eos_token_id": 29}, r"eos_token_id has 29, expected ids below vocab_size 29"),
        ({"do_sample": "false"}, r"do_sample is 'false', expected true or false"),
        ({"temperature": -1}, r"temperature is -1, expected a number from 0 to 1e\+06"),
        ({"top_k": 2.5}, r"top_k is 2\.5, expected a whole number"),
        ({"bad_words_ids": [3]}, r"bad_words_ids\[0\] is 3, expected a list of a whole number"),
        ({"stop_strings": [""]}, r"stop_strings\[0\] is '', expected a text that is not empty"),
        ([], r"generation_config\.json holds a JSON list, expected an object"),
    ],
)
def test_bad_generation_defaults(tmp_path, stated, pattern):
    save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps(stated))
    refused(tmp_path, pattern)
