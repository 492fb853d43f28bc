"""Tokenizer, chat templates, and streamed text."""

import datetime
import json
import random

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from ridgeline.model.checkpoint import CheckpointError
from ridgeline.model.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Once upon a time, there was a fox.",
    "don't  stop:   three spaces, a tab\t and\n\nnew lines  ",
    " leading space, and a trailing one ",
    "👩‍👩‍👧‍👦 family, 🇨🇭 flag, 👍🏽 thumbs",
    "漢字とかな交じり文、한국어 그리고 中文。",
    "e\u0301 combining, Ç̃̂ more, ﷽, नमस्ते, สวัสดี",
    "mixed 漢 a 🙂b\u200dc \ufffd a real replacement character, and 🙂🙂🙂",
    "",
]

LLAMA3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' + "
    "message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
QWEN = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(seen=false) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.seen = true %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant\\n' ~ (message.tool_calls[0].function | tojson(indent=2)) ~ '<|im_end|>\\n' }}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}\n{% for message in messages %}\n  {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}\n"
    "    {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}\n  {% endif %}\n"
    "  {% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}\n{% generation %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endgeneration %}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
DATED = "{{ strftime_now('%d %B %Y') }}|{{ messages[0].content }}|{{ eos_token }}|{{ documents is none }}"

TURNS = [
    {"role": "user", "content": "  Who are you? <b>&'\"  "},
    {"role": "assistant", "content": "I am 漢字 🙂.\n", "tool_calls": None},
    {"role": "user", "content": "Why?"},
]
TOOLS = [{"type": "function", "function": {"name": "f<&>", "description": "naïve", "parameters": {"a": [1, None]}}}]
CALL = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"x": "é"}}}]},
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:3] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def llama2_like() -> Backend:
    """Sentencepiece BPE with byte fallback, as Llama 2 and Gemma have it: a space is prepended, and stripped again."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "f"), ("o", "x"), ("▁f", "ox")]
    vocab = {piece: index for index, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BACKENDS = {"byte-level": byte_level, "metaspace": metaspace, "byte-fallback": llama2_like}


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


def save(directory, backend: Backend, config: dict | None = None, **files):
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory


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


def test_chat_template_of_llama3():
    tokenizer = Tokenizer(byte_level(), {"bos_token": "<s>"}, {"default": LLAMA3})
    messages = [{"role": "user", "content": " Hi "}]
    body = "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    assert tokenizer.apply_chat_template(messages) == body + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == body


def test_chat_template_dates_and_none():
    tokenizer = Tokenizer(byte_level(), {"eos_token": "</s>"}, {"default": DATED})
    today = datetime.datetime.now().strftime("%d %B %Y")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}]) == f"{today}|x|</s>|True"


def test_keys_of_a_message_whose_value_is_none_are_absent():
    tokenizer = Tokenizer(byte_level(), {}, {"default": "{{ messages[0].content is defined }}"})
    assert tokenizer.apply_chat_template([{"role": "assistant", "content": None}]) == "False"


def test_chat_template_is_chosen_by_name(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = load_tokenizer(save(tmp_path, byte_level(), {"chat_template": named}))
    assert tokenizer.apply_chat_template(TURNS) == "plain"
    assert tokenizer.apply_chat_template(TURNS, tools=TOOLS) == "tools"
    assert tokenizer.apply_chat_template(TURNS, template="tool_use") == "tools"
    with pytest.raises(ValueError, match=r"no chat template 'rag' \(it has default, tool_use\)"):
        tokenizer.apply_chat_template(TURNS, template="rag")


def test_chat_template_files_come_before_the_config(tmp_path):
    save(tmp_path, byte_level(), {"chat_template": "from the config"})
    assert load_tokenizer(tmp_path).apply_chat_template(TURNS) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("with documents")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(TURNS) == "from the file"
    assert tokenizer.apply_chat_template(TURNS, template="rag") == "with documents"


def test_chat_template_errors(tmp_path):
    plain = Tokenizer(byte_level())
    with pytest.raises(
        ValueError, match=r"no chat template 'default' \(it has none\); for a chat model, put its chat_"
    ):
        plain.apply_chat_template(TURNS)
    gemma = Tokenizer(byte_level(), {"bos_token": "<s>"}, {"default": GEMMA})
    with pytest.raises(ValueError, match="'default' refuses these messages: System role not supported"):
        gemma.apply_chat_template(CALL)
    with pytest.raises(ValueError, match=r"messages are \[\]; expected at least one"):
        gemma.apply_chat_template([])
    with pytest.raises(ValueError, match="does not parse at line 2"):
        Tokenizer(byte_level(), {}, {"default": "a\n{% if %}"}).apply_chat_template(TURNS)
    with pytest.raises(ValueError, match=r"refuses these messages: .*unsafe"):
        Tokenizer(byte_level(), {}, {"default": "{{ messages.__class__.__mro__ }}"}).apply_chat_template(TURNS)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is a int"):
        load_tokenizer(save(tmp_path, byte_level(), {"chat_template": 3}))


@pytest.mark.parametrize(
    ("template", "messages", "options"),
    [
        (LLAMA3, TURNS, {}),
        (LLAMA3, TURNS, {"add_generation_prompt": False}),
        (QWEN, TURNS, {}),
        (QWEN, TURNS, {"enable_thinking": False}),
        (QWEN, CALL, {"tools": TOOLS}),
        (GEMMA, TURNS, {}),
        (GEMMA, TURNS[:1], {"add_generation_prompt": False}),
        (DATED, TURNS, {}),
    ],
)
def test_chat_templates_render_as_in_transformers(tmp_path, template, messages, options):
    transformers = pytest.importorskip("transformers")
    backend = byte_level()
    backend.add_special_tokens([AddedToken("<|eot_id|>"), AddedToken("<|im_end|>")])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False},
        "chat_template": template,
    }
    save(tmp_path, backend, config)
    reference, ours = transformers.AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    options = {"add_generation_prompt": True} | options
    text = ours.apply_chat_template(messages, **options)
    assert text == reference.apply_chat_template(messages, tokenize=False, **options)
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.encode(TEXTS[4]) == reference(TEXTS[4])["input_ids"]
