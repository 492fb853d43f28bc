"""When a request ends, and which of its text may be shown: no model, no device."""

import dataclasses

import pytest

import ridgeline as rl
from backends import llama2_like
from ridgeline.decode.prompts import with_checkpoint_rules
from ridgeline.decode.request import Request
from ridgeline.decode.sampling.params import SamplingParams
from ridgeline.model.generation import GenerationDefaults
from tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = 300


def run(text_or_tokens, max_tokens=1000, **params):
    """Push a text byte by byte; returns the request and the text as it was streamed."""
    tokens = TOKENIZER.encode(text_or_tokens) if isinstance(text_or_tokens, str) else text_or_tokens
    request = Request([1], SamplingParams(max_tokens=None, **params), max_tokens, 0, [EOS], TOKENIZER)
    shown = []
    for token in tokens:
        request.extend([token])
        shown.append(request.take_text())
    assert "".join(shown) == request.text[: len("".join(shown))]
    return request, shown


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("END", "one two ", "END"),
        (["nope", "o"], "", "o"),
        (["ND", "END"], "one two ", "END"),  # completed by the same byte: the one that begins earlier
        (["two END", "END"], "one ", "two END"),
        ("missing", "one two END three", None),
    ],
)
def test_stop_strings_cut_the_text(stop, text, reason):
    request, shown = run("one two END three", stop=stop)
    assert (request.text, request.stop_reason) == (text, reason)
    assert request.finished == (reason is not None)
    if request.finished:
        assert "".join(shown) == text


def test_a_stop_string_is_found_inside_a_block_of_text_and_kept_on_request():
    request, shown = run("ab<end>cd", stop="<end>", include_stop_str_in_output=True)
    assert request.text == "".join(shown) == "ab<end>"
    assert len(request.tokens) == len("ab<end>")


CHAT = byte_tokenizer()
CHAT.backend.add_special_tokens(["<|im_end|>", "<|im_start|>"])


@pytest.mark.parametrize(
    ("stop", "included", "text", "reason"),
    [
        ("<|im_end|>", False, "hi", "<|im_end|>"),
        (["nope", "<|im_end|>"], True, "hi", "<|im_end|>"),  # special tokens stay out of the text
        ("i<|im_end|>", False, "h", "i<|im_end|>"),
        ("<|im_end|>\n", False, "hi", "<|im_end|>\n"),
        ("<|im_end|>\n<|im_start|>u", True, "hi\nu", "<|im_end|>\n<|im_start|>u"),
        ("<|im_start|>", False, "hi\n", "<|im_start|>"),
        (["us", "<|im_start|>x"], False, "hi\n", "us"),
    ],
)
@pytest.mark.parametrize("block", [1, 3, 100])
def test_stop_strings_that_hold_special_tokens(stop, included, text, reason, block):
    params = SamplingParams(max_tokens=None, stop=stop, include_stop_str_in_output=included)
    request, shown = Request([1], params, 1000, 0, [], CHAT), ""
    for at, token in enumerate(CHAT.encode("hi<|im_end|>\n<|im_start|>user")):
        request.extend([token])
        shown += request.take_text() if at % block == block - 1 or request.finished else ""
    assert (request.text, request.finish_reason, request.stop_reason) == (text, "stop", reason)
    assert shown == text


def test_shown_special_tokens_are_searched_as_text():
    params = SamplingParams(max_tokens=None, stop="|>x", skip_special_tokens=False)
    request = Request([1], params, 99, 0, [], CHAT)
    for token in CHAT.encode("hi<|im_end|>x"):
        request.extend([token])
    assert (request.text, request.stop_reason) == ("hi<|im_end", "|>x")


def test_text_follows_the_prompts():
    """The first space of a completion is the tokenizer's to drop only where nothing comes before."""
    tokenizer = rl.Tokenizer(llama2_like())
    the, fox = tokenizer.encode("the fox")
    for prompt, stop, expected in (([the], None, " fox the"), ([], None, "fox the"), ([1, the], " the", " fox")):
        request, shown = Request(prompt, SamplingParams(stop=stop), 2, 0, [], tokenizer), ""
        for token in (fox, the):
            request.extend([token])
            shown += request.take_text()
        assert request.text == shown == expected


def test_what_the_checkpoint_asks_of_every_request(model):
    rules = GenerationDefaults(
        suppress_tokens=(3, 900), begin_suppress_tokens=(5, 900), bad_words=((4,), (5, 6)), stop_strings=("END", "x")
    )
    asking = dataclasses.replace(model, tokenizer=TOKENIZER, generation=rules)
    params = with_checkpoint_rules(SamplingParams(stop="x", suppress_tokens=[8, 3]), asking)
    assert (params.stop, params.suppress_tokens, params.begin_suppress_tokens) == (("x", "END"), (8, 3, 4), (5,))
    assert with_checkpoint_rules(SamplingParams(ignore_eos=True), asking).stop == ()
    assert with_checkpoint_rules(SamplingParams(), dataclasses.replace(asking, tokenizer=None)).stop == ()
    assert with_checkpoint_rules(SamplingParams(), model) == SamplingParams()


def test_text_that_may_become_a_stop_string_is_held_back():
    _, shown = run("abSTOx", stop="STOP")
    assert "".join(shown[:5]) == "ab"
    request, shown = run("abSTO", stop="STOP", max_tokens=5)
    assert "".join(shown) == request.text == "abSTO"  # the end came: it was no stop string
    assert request.finish_reason == "length"


def test_a_character_of_several_tokens_is_shown_whole():
    request, shown = run("é🙂!", max_tokens=7)
    assert shown == ["", "é", "", "", "", "🙂", "!"]
    request, shown = run(TOKENIZER.encode("🙂")[:2], max_tokens=2)
    assert request.text == "".join(shown) == "\ufffd"


@pytest.mark.parametrize("ignored", [False, True])
def test_end_of_sequence(ignored):
    request, _ = run([*TOKENIZER.encode("hi"), EOS, *TOKENIZER.encode("!")], ignore_eos=ignored)
    assert request.finished is not ignored
    assert request.text == ("hi!" if ignored else "hi")
    assert request.stop_reason == (None if ignored else EOS)
    assert len(request.tokens) == (4 if ignored else 3)  # the stop token is counted


def test_stop_token_ids_end_and_leave_no_text():
    (token,) = TOKENIZER.encode("c")
    request, _ = run("abcd", stop_token_ids=[token])
    assert (request.text, request.finish_reason, request.stop_reason) == ("ab", "stop", token)
    request, _ = run("abcd", stop_token_ids=[token], include_stop_str_in_output=True)
    assert request.text == "abc"


def test_nothing_ends_before_min_tokens():
    (token,) = TOKENIZER.encode("a")
    request, _ = run("aaXaa", stop_token_ids=[token], stop="X", min_tokens=4)
    assert request.text == "aaX"
    assert len(request.tokens) == 4


def test_length_and_what_comes_after():
    request, _ = run("abcdef", max_tokens=3)
    assert (request.text, request.finish_reason, request.tokens) == ("abc", "length", TOKENIZER.encode("abc"))
    output = request.output()
    assert output.prompt_tokens == [1]
    assert output.ttft >= 0
    assert output.tpot >= 0


def test_without_a_tokenizer_there_is_no_text():
    request = Request([1], SamplingParams(), 2, 0, [], None)
    request.extend([5])
    assert (request.take_text(), request.output().text) == ("", None)
    assert request.output().finish_reason == "abort"  # of two tokens it has one
