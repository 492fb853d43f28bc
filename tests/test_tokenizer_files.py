"""A checkpoint's tokenizer from all of its files, with transformers' ids."""

import base64
import json
import subprocess
import sys
import warnings
from itertools import pairwise

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from backends import TEXTS, byte_level, llama2_like, save
from ridgeline.model.checkpoint import CheckpointError
from ridgeline.model.tokenizer import Tokenizer, load_tokenizer
from ridgeline.model.tokenizer.converted import CONVERTED

BYTES, PIECES = byte_level().get_vocab_size(), llama2_like().get_vocab_size()


def token(content: str, **flags: bool) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False, "special": True} | flags


def test_truncation_and_padding_of_the_file_are_switched_off(tmp_path):
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=64, pad_token="<s>", pad_id=0)
    tokenizer = load_tokenizer(save(tmp_path, backend))
    ids = tokenizer.encode(TEXTS[0])
    assert tokenizer.decode(ids) == TEXTS[0]
    assert ids.count(0) == 1


def test_no_tokenizer_is_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


def test_damaged_tokenizer_names_the_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is no tokenizer .*fetch it again"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("config", "special_map", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": None, "add_bos_token": True}, None, {"bos_token": "<s>"}),
        ({"eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False}}, None, {"eos_token": "</s>"}),
        ({}, {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}, {"bos_token": "<s>", "eos_token": "</s>"}),
        ({"bos_token": "<s>", "added_tokens_decoder": {}}, {"bos_token": "</s>"}, {"bos_token": "<s>"}),
        (None, None, {}),
    ],
)
def test_special_tokens_come_from_either_file(tmp_path, config, special_map, expected):
    files = {} if special_map is None else {"special_tokens_map": special_map}
    assert load_tokenizer(save(tmp_path, byte_level(), config, **files)).special_tokens == expected


# --- tokens that tokenizer.json lacks ---


def test_tokens_of_added_tokens_decoder(tmp_path):
    n = PIECES
    listed = {"1": token("<s>", normalized=False), str(n): token("<|im_start|>"), str(n + 1): token("<|im_end|>")}
    config = {"added_tokens_decoder": listed, "eos_token": "<|im_end|>"}
    tokenizer = load_tokenizer(save(tmp_path, llama2_like(), config))
    the = tokenizer.backend.token_to_id("▁the")
    assert tokenizer.encode("<|im_start|>the<|im_end|>") == [n, the, n + 1]
    assert tokenizer.eos_token_id == n + 1
    assert tokenizer.decode([n, the, n + 1]) == "the"
    assert tokenizer.decode([n, the, n + 1], skip_special_tokens=False) == "<|im_start|> the<|im_end|>"


def test_special_token_of_the_plain_vocabulary(tmp_path):
    """As in byte-level tokenizers whose training had the token as a word."""
    backend = json.loads(byte_level().to_str())
    backend["model"]["vocab"]["<|im_end|>"] = BYTES
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    tokenizer = load_tokenizer(tmp_path)
    ids = tokenizer.encode("fox<|im_end|>")
    assert ids == [*tokenizer.encode("fox"), BYTES]
    assert tokenizer.eos_token_id == BYTES
    assert tokenizer.decode(ids) == "fox"


def test_tokens_become_special_where_the_config_says_so(tmp_path):
    backend = byte_level()
    backend.add_tokens(["<tool>"])
    tokenizer = load_tokenizer(save(tmp_path, backend, {"added_tokens_decoder": {str(BYTES): token("<tool>")}}))
    assert tokenizer.decode(tokenizer.encode("fox<tool>")) == "fox"


@pytest.mark.parametrize(
    ("config", "files", "special"),
    [
        ({"extra_special_tokens": ["<new>"]}, {}, True),
        ({"additional_special_tokens": [token("<new>", special=False)]}, {}, True),
        ({"extra_special_tokens": {"image_token": "<new>"}}, {}, True),
        ({"image_token": "<new>"}, {}, True),
        ({"pad_token": token("<new>", special=False)}, {}, True),
        ({}, {"added_tokens": {"<new>": BYTES}}, False),
        ({}, {"added_tokens": {"<new>": BYTES}, "special_tokens_map": {"eos_token": "<new>"}}, True),
        ({"added_tokens_decoder": {str(BYTES): token("<new>", special=False)}}, {}, False),
    ],
)
def test_every_way_of_adding_a_token(tmp_path, config, files, special):
    tokenizer = load_tokenizer(save(tmp_path, byte_level(), config, **files))
    ids = tokenizer.encode("fox<new>")
    assert ids == [*tokenizer.encode("fox"), BYTES]
    assert tokenizer.decode(ids) == ("fox" if special else "fox<new>")
    assert tokenizer.special_tokens.get("image_token") == ("<new>" if "image" in str(config) else None)


def test_what_the_files_contradict_each_other_in_is_said(tmp_path):
    config = {"added_tokens_decoder": {str(BYTES + 5): token("<new>")}}
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json gives <new> other ids than tokenizer\.json leads to"):
        assert load_tokenizer(save(tmp_path, byte_level(), config)).encode("<new>")[1:] == [BYTES]
    config = {"bos_token": "<s>", "add_bos_token": False}
    with pytest.warns(UserWarning, match=r"has add_bos_token False, and tokenizer\.json does otherwise"):
        assert load_tokenizer(save(tmp_path, byte_level(), config)).encode("fox")[0] == 0


def test_special_tokens_are_spelled_out_where_the_config_says_so(tmp_path):
    tokenizer = load_tokenizer(save(tmp_path, byte_level(), {"split_special_tokens": True}))
    assert tokenizer.encode("<s>", add_special_tokens=False) != [0]


def test_tokens_beyond_the_models_vocabulary(tmp_path):
    directory = save(tmp_path, byte_level(), {"extra_special_tokens": ["<new>"]})
    size = byte_level().get_vocab_size()
    with pytest.warns(UserWarning, match=rf"1 tokens beyond the vocab_size {size} .* no prompt may have: <new>"):
        load_tokenizer(directory, size)
    with pytest.raises(CheckpointError, match=rf"tokenizer in .* has 2 tokens beyond the vocab_size {size - 1}"):
        load_tokenizer(directory, size - 1)


def test_what_the_backend_cannot_take():
    backend = Backend(models.WordLevel({"a": 0}))  # without an unknown token
    with pytest.raises(ValueError, match=r"the tokenizer cannot encode zebra: .*UNK"):
        Tokenizer(backend).encode("zebra")
    with pytest.raises(ValueError, match="the text has byte 0x80, which is not UTF-8, at 1"):
        Tokenizer(backend).encode("a\udc80")
    with pytest.raises(ValueError, match=r"the text has half a character, '\\ud800', at 1"):
        Tokenizer(backend).encode("a\ud800")
    with pytest.raises(ValueError, match=r"ids is \[-1\]; token ids are at least 0"):
        Tokenizer(backend).decode([-1])


@pytest.mark.parametrize(
    ("name", "value", "pattern"),
    [
        (
            "tokenizer_config",
            {"added_tokens_decoder": ["<new>"]},
            r"_config\.json: added_tokens_decoder is \['<new>'\]",
        ),
        (
            "tokenizer_config",
            {"added_tokens_decoder": {"x": token("<new>")}},
            r"added_tokens_decoder has the ids \['x'\]",
        ),
        ("tokenizer_config", {"added_tokens_decoder": {"9": 3}}, r"added_tokens_decoder\.9 is 3, expected an object"),
        ("tokenizer_config", {"additional_special_tokens": [{"content": 3}]}, "additional_special_tokens is .*3"),
        ("tokenizer_config", {"extra_special_tokens": "<new>"}, "extra_special_tokens is '<new>', expected a list"),
        (
            "tokenizer_config",
            {"eos_token": token("x", lstrip="no")},
            r"eos_token\.lstrip is 'no', expected true or false",
        ),
        ("added_tokens", {"<new>": "9"}, r"added_tokens\.json: <new> is '9', expected a whole number"),
    ],
)
def test_tokens_that_are_none(tmp_path, name, value, pattern):
    with pytest.raises(CheckpointError, match=pattern):
        load_tokenizer(save(tmp_path, byte_level(), **{name: value}))


@pytest.mark.parametrize("make", [byte_level, llama2_like])
@pytest.mark.parametrize(
    ("config", "files"),
    [
        ({"added_tokens_decoder": {"N": token("<tool>", lstrip=True, rstrip=True)}}, {}),
        ({"added_tokens_decoder": {"N": token("<tool>", normalized=True, special=False)}}, {}),
        ({"added_tokens_decoder": {"1": token("<s>", special=False)}, "bos_token": "<s>"}, {}),
        ({"extra_special_tokens": ["<new>", "<tool>"], "pad_token": "[PAD]"}, {}),
        ({"eos_token": "</s>", "add_bos_token": True, "add_eos_token": True, "bos_token": "<s>"}, {}),
        ({}, {"added_tokens": {"<tool>": "N", "<new>": "N+1"}}),
        ({"eos_token": "</s>"}, {"special_tokens_map": {"eos_token": token("<new>"), "pad_token": "[PAD]"}}),
    ],
)
def test_ids_are_those_of_transformers(tmp_path, make, config, files):
    transformers, n = pytest.importorskip("transformers"), make().get_vocab_size()
    config, files = json.loads(json.dumps([config, files]).replace('"N+1"', str(n + 1)).replace('"N": ', f'"{n}": '))
    files = {name: {k: n if v == "N" else v for k, v in value.items()} for name, value in files.items()}
    save(tmp_path, make(), {"tokenizer_class": "PreTrainedTokenizerFast"} | config, **files)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, reference = load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in ("fox <tool> the<new> fox", "[PAD]the</s>", "<tool>"):
        ids = reference(text)["input_ids"]
        assert ours.encode(text) == ids
        for skip in (True, False):
            assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    assert (ours.eos_token_id, ours.special_tokens) == (reference.eos_token_id, reference.special_tokens_map)


# --- tokenizers in other files ---


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2TokenizerFast"])
def test_vocabulary_and_merges(tmp_path, kind):
    byte_level().model.save(str(tmp_path))
    listed = {str(BYTES): token("<|im_end|>")}
    config = {"tokenizer_class": kind, "eos_token": "<|im_end|>", "added_tokens_decoder": listed}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<s>", "add_bos_token": True}))
    tokenizer = load_tokenizer(tmp_path)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == (text.replace("e\u0301", "é") if "Q" in kind else text)
    ids = tokenizer.encode("fox<|im_end|>")
    assert (ids[0], ids[-1]) == (0, BYTES)
    reference = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "THERE'S 1234 of\n\n them<|im_end|>"):
        assert tokenizer.encode(text) == reference(text)["input_ids"]


@pytest.mark.parametrize("names", [["tokenizer.model"], ["tekken.json"], ["vocab.json", "merges.txt"], ["vocab.txt"]])
def test_other_files_are_named_with_the_command_that_converts_them(tmp_path, monkeypatch, names):
    monkeypatch.setitem(sys.modules, "transformers", None)  # as where it is not installed
    for name in names:
        (tmp_path / name).write_text("{}")
    expected = rf"its tokenizer in {', '.join(names)} and no tokenizer\.json, .*from_pretrained.*save_pretrained"
    with pytest.raises(CheckpointError, match=expected) as told:
        load_tokenizer(tmp_path)
    assert ("could not be converted (import of transformers" in str(told.value)) == (names[0] in CONVERTED)


WITHOUT_TORCH = """
import importlib.util, json, pathlib, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
sys.modules["torch"] = None
from ridgeline.model.tokenizer import Tokenizer, load_tokenizer
tokenizer = load_tokenizer(pathlib.Path(sys.argv[1]))
ids = [tokenizer.encode(text) for text in json.loads(sys.argv[2])]
print(json.dumps([ids, [tokenizer.decode(row) for row in ids], tokenizer.special_tokens]))
"""
SPACED = ["the fox", "a  quick\nfox", "Ωμέγα 你好 🙂", "the king</s>", ""]


def read_without_torch(directory):
    command = [sys.executable, "-c", WITHOUT_TORCH, str(directory), json.dumps(SPACED)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("bpe", {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}),
        ("unigram", {}),
    ],
)
def test_sentencepiece_models_have_the_ids_of_sentencepiece(tmp_path, kind, options):
    """And the code that the checkpoint brings is not run."""
    pytest.importorskip("transformers")
    sentencepiece = pytest.importorskip("sentencepiece")
    lines, prefix = ["the quick brown fox and the king", "once upon a time a fox"] * 50, str(tmp_path / "tokenizer")
    sizes = {"vocab_size": 300, "hard_vocab_limit": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=prefix, model_type=kind, **sizes, **options
    )
    with_code(tmp_path, tokenizer_class="LlamaTokenizer")
    reference = sentencepiece.SentencePieceProcessor(model_file=f"{prefix}.model")
    ids, texts, special = read_without_torch(tmp_path)
    for text, row in zip(SPACED, ids, strict=True):
        plain = text.removesuffix("</s>")
        assert row == [reference.bos_id(), *reference.encode(plain), *[reference.eos_id()] * (plain != text)]
    if kind == "bpe":
        assert texts == [text.replace("</s>", "") for text in SPACED]
    assert special == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert not (tmp_path / "was_run").exists()


def with_code(directory, **config):
    """Write a tokenizer_config.json that names code of the checkpoint, which leaves a mark when it is run."""
    code = f"import pathlib\npathlib.Path({str(directory / 'was_run')!r}).touch()\nclass Own: ...\n"
    (directory / "own.py").write_text(code)
    config["auto_map"] = {"AutoTokenizer": ["own.Own", "own.Own"], "AutoConfig": "own.Own"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def test_tekken_has_the_ids_of_byte_pair_merges(tmp_path):
    pytest.importorskip("transformers")
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokens = [
        *(bytes([n]) for n in range(256)),
        b"th",
        b"the",
        b" the",
        b"fo",
        b"ox",
        b" fo",
        b" fox",
        b"ki",
        b"in",
        b"ing",
    ]
    special, fillers = ["<unk>", "<s>", "</s>", "[INST]"], 8
    stated = {
        "config": {
            "pattern": pattern,
            "default_vocab_size": len(tokens) + fillers,
            "default_num_special_tokens": fillers,
            "version": "v7",
        },
        "vocab": [{"rank": n, "token_bytes": base64.b64encode(t).decode()} for n, t in enumerate(tokens)],
        "special_tokens": [{"rank": n, "token_str": t, "is_control": True} for n, t in enumerate(special)],
    }
    (tmp_path / "tekken.json").write_text(json.dumps(stated))
    (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
    ids, texts, named = read_without_torch(tmp_path)
    ranks = {token: n for n, token in enumerate(tokens)}

    def merged(piece: bytes) -> list[int]:
        parts = [piece[n : n + 1] for n in range(len(piece))]
        while pairs := [(ranks[a + b], n) for n, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, n = min(pairs)
            parts[n : n + 2] = [parts[n] + parts[n + 1]]
        return [fillers + ranks[part] for part in parts]

    pieces = [
        ["the", " fox"],
        ["a", " ", " quick", "\n", "fox"],
        ["Ωμέγα", " 你好", " 🙂"],
        ["the", " king", None],
        [],
    ]
    for row, of in zip(ids, pieces, strict=True):
        assert row == [1, *(id for piece in of for id in ([2] if piece is None else merged(piece.encode())))]
    assert texts == [text.replace("</s>", "") for text in SPACED]
    assert named == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", ["tokenizer.model", "tekken.json"])
def test_damaged_files_of_other_tokenizers(tmp_path, name):
    (tmp_path / name).write_text("{}")
    with_code(tmp_path, tokenizer_class="Own")
    with pytest.raises(CheckpointError, match=rf"its tokenizer in {name} and no tokenizer\.json, .*not be converted"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "was_run").exists()
