"""Text to ids and back, whole and as it comes."""

import random

import pytest

from backends import BACKENDS, TEXTS, byte_level, llama2_like
from ridgeline.model.tokenizer import StreamDecoder, Tokenizer


@pytest.fixture(scope="module", params=BACKENDS)
def tokenizer(request) -> Tokenizer:
    return Tokenizer(BACKENDS[request.param]())


def streamed(tokenizer: Tokenizer, ids: list[int], sizes=(1,), skip_special_tokens: bool = True) -> list[str]:
    stream, pieces, start, turn = StreamDecoder(tokenizer, skip_special_tokens), [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(stream.feed(ids[start : start + size]))
        start, turn = start + size, turn + 1
    return [*pieces, stream.flush()]


@pytest.mark.parametrize("sizes", [(1,), (3,), (1, 4, 2)])
@pytest.mark.parametrize("text", TEXTS)
def test_streamed_pieces_join_to_the_decoded_text(tokenizer, text, sizes):
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids, sizes)) == tokenizer.decode(ids)


def test_streamed_text_is_told_as_soon_as_a_character_is_whole():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("🙂a漢", add_special_tokens=False)
    assert len(ids) == 8  # four bytes, one letter, three bytes: none was merged
    assert streamed(tokenizer, ids) == ["", "", "", "🙂", "a", "", "", "漢", ""]


def test_flush_tells_an_incomplete_character_and_starts_over():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("a漢", add_special_tokens=False)
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(ids[:2]), stream.feed(ids[2:3])] == ["", ""]
    assert stream.flush() == tokenizer.decode(ids[:3]) == "a\ufffd"
    assert stream.feed(ids) + stream.flush() == "a漢"
    assert stream.flush() == ""


def test_streamed_random_bytes_join_to_the_decoded_text():
    """A byte-level model may sample any bytes, those of no character included."""
    tokenizer, rng = Tokenizer(byte_level()), random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 24))]
        for skip in (True, False):
            assert "".join(streamed(tokenizer, ids, (1, 2), skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ["metaspace", "byte-fallback"])
def test_streamed_random_pieces_join_to_the_decoded_text(name):
    tokenizer, rng = Tokenizer(BACKENDS[name]()), random.Random(1)
    usable = [i for piece, i in tokenizer.backend.get_vocab().items() if not piece.startswith("<0x")]
    for _ in range(300):
        ids = [rng.choice(usable) for _ in range(rng.randrange(1, 24))]
        for skip in (True, False):
            assert "".join(streamed(tokenizer, ids, (1, 2), skip)) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("place", [-1, -3])
def test_bytes_that_never_make_a_character_are_shown_as_they_come(monkeypatch, name, place):
    """In time that grows with their number alone."""
    tokenizer = Tokenizer(BACKENDS[name]())
    byte = tokenizer.encode("漢", add_special_tokens=False)[place]
    stream, decoded, decode = StreamDecoder(tokenizer), [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    pieces = [stream.feed([byte]) for _ in range(500)]
    assert "".join(pieces) == "\ufffd" * (500 - 3) or "".join(pieces) == "\ufffd" * (500 - 1)
    assert "".join(pieces) + stream.flush() == "\ufffd" * 500
    assert sum(decoded) < 500 * 60


def test_leading_spaces_survive_streaming():
    tokenizer = Tokenizer(llama2_like())
    ids = tokenizer.encode("the fox  the")
    assert [tokenizer.backend.id_to_token(i) for i in ids] == ["▁the", "▁fox", "▁", "▁the"]
    assert streamed(tokenizer, ids) == ["the", " fox", " ", " the", ""]


def test_round_trip(tokenizer):
    text = "the quick fox"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    with_bos = tokenizer.encode(text)
    without = tokenizer.encode(text, add_special_tokens=False)
    assert with_bos[-len(without) :] == without
    assert tokenizer.decode([]) == ""
    assert tokenizer.decode([*without, tokenizer.vocab_size + 100]) == text  # a padded vocabulary's id


def test_special_tokens_are_added_and_skipped_when_asked():
    tokenizer = Tokenizer(byte_level(), {"bos_token": "<s>", "eos_token": "</s>"})
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer.encode("fox")
    assert ids[0] == 0
    assert tokenizer.encode("fox", add_special_tokens=False) == ids[1:]
    assert tokenizer.decode([*ids, 1]) == "fox"
    assert tokenizer.decode([*ids, 1], skip_special_tokens=False) == "<s>fox</s>"
    assert Tokenizer(byte_level()).eos_token_id is None


def test_text_that_begins_with_the_bos_gets_no_second_one():
    tokenizer = Tokenizer(byte_level(), {"bos_token": "<s>"})
    assert tokenizer.encode("<s>fox") == tokenizer.encode("fox")
    assert tokenizer.encode("<s><s>fox")[:3] == [0, 0, *tokenizer.encode("fox")[1:2]]  # as it is written
    assert tokenizer.encode("<s>fox", add_special_tokens=False) == tokenizer.encode("fox")
    assert tokenizer.encode("") == tokenizer.encode("<s>") == [0]


@pytest.mark.parametrize(
    ("backend", "before", "after", "expected"),
    [
        (llama2_like, "the fox the", "the fox", " the fox"),  # the first space is the tokenizer's to drop
        (llama2_like, "the", "the", " the"),
        (byte_level, "fox", " fox", " fox"),
        (byte_level, "", "fox", "fox"),
    ],
)
def test_streamed_text_follows_its_context(backend, before, after, expected):
    tokenizer = Tokenizer(backend())
    context, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
    stream = StreamDecoder(tokenizer, context=context)
    assert "".join([*(stream.feed([id]) for id in ids), stream.flush()]) == expected


def test_a_character_that_the_context_leaves_unfinished_is_whole():
    tokenizer = Tokenizer(byte_level())
    *context, last = tokenizer.encode("fox 🙂", add_special_tokens=False)
    stream = StreamDecoder(tokenizer, context=context)
    assert stream.feed([last]) + stream.flush() == "🙂"
    stream = StreamDecoder(tokenizer, context=tokenizer.encode("🙂" * 8, add_special_tokens=False))
    assert stream.feed(tokenizer.encode("a", add_special_tokens=False)) == "a"
