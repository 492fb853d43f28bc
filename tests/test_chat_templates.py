"""Chat templates: what they are given, what they make of it, as in transformers."""

import datetime
import enum
import functools
from typing import Any, Literal

import pytest
from tokenizers import AddedToken

from backends import TEXTS, byte_level, save
from ridgeline.model.checkpoint import CheckpointError
from ridgeline.model.tokenizer import Tokenizer, load_tokenizer
from ridgeline.model.tokenizer.functions import function_schema

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


REASONING = "{% for m in messages %}<{{ m.reasoning_content }}|{{ m.thinking }}>{{ m.content }}!{% endfor %}"
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def add(x: float, numbers: list[int] | None = None, how: Literal["up", "down"] = "up") -> str:
    """
    Adds numbers.

    Args:
        x: the first,
            which is described on two lines
        numbers (list): the others
        how: which way to round

    Returns:
        The sum.
    """


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
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }}"}]
    tokenizer = load_tokenizer(save(tmp_path, byte_level(), {"chat_template": named}))
    assert tokenizer.apply_chat_template(TURNS) == "plain"
    assert tokenizer.apply_chat_template(TURNS, tools=TOOLS) == "1"
    assert tokenizer.apply_chat_template(TURNS, chat_template="default", add_generation_prompt=False) == "plain"
    with pytest.raises(ValueError, match=r"no chat template 'rag' \(it has default, tool_use\)"):
        tokenizer.apply_chat_template(TURNS, chat_template="rag")


def test_chat_template_files_come_before_the_config(tmp_path):
    save(tmp_path, byte_level(), {"chat_template": "from the config"})
    assert load_tokenizer(tmp_path).apply_chat_template(TURNS) == "from the config"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("with documents")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(TURNS) == "from the file"
    assert tokenizer.apply_chat_template(TURNS, chat_template="rag") == "with documents"


def test_chat_template_errors(tmp_path):
    plain = Tokenizer(byte_level())
    with pytest.raises(
        ValueError, match=r"no chat template 'default' \(it has none\); for a chat model, put its chat_"
    ):
        plain.apply_chat_template(TURNS)
    gemma = Tokenizer(byte_level(), {"bos_token": "<s>"}, {"default": GEMMA})
    with pytest.raises(ValueError, match="'default' refuses these messages: System role not supported \\(line 1\\)"):
        gemma.apply_chat_template(CALL)
    with pytest.raises(ValueError, match=r"messages are \[\]; expected at least one"):
        gemma.apply_chat_template([])
    with pytest.raises(ValueError, match="does not parse at line 2"):
        Tokenizer(byte_level(), {}, {"default": "a\n{% if %}"}).apply_chat_template(TURNS)
    with pytest.raises(ValueError, match=r"refuses these messages: .*unsafe"):
        Tokenizer(byte_level(), {}, {"default": "{{ messages.__class__.__mro__ }}"}).apply_chat_template(TURNS)
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is 3, expected a text or a list"):
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
        (QWEN, [*TURNS, {"role": "assistant", "content": "Well, "}], {"continue_final_message": True}),
        (LLAMA3, [*TURNS, {"role": "assistant", "content": "Well, "}], {"continue_final_message": True}),
        (REASONING, [{"role": "assistant", "content": "x", "reasoning": "So", "thinking": None}], {}),
        (REASONING, [{"role": "assistant", "thinking": "So"}], {"continue_final_message": "reasoning_content"}),
        (QWEN, CALL, {"tools": [add]}),
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
    options = {"add_generation_prompt": "continue_final_message" not in options} | options
    text = ours.apply_chat_template(messages, **options)
    assert text == reference.apply_chat_template(messages, tokenize=False, **options)
    expected = reference.apply_chat_template(messages, tokenize=True, return_dict=False, **options)
    assert ours.encode(text, add_special_tokens=False) == expected
    assert ours.encode(TEXTS[4]) == reference(TEXTS[4])["input_ids"]


# --- arguments ---


def chat(template: str, *messages: dict, **options) -> str:
    return Tokenizer(byte_level(), {"bos_token": "<s>"}, {"default": template}).apply_chat_template(messages, **options)


def said(content: str, role: str = "user", **more) -> dict:
    return {"role": role, "content": content, **more}


def test_the_final_message_is_continued():
    turns = said("hi"), said("Well, ", "assistant")
    assert chat(CHATML, *turns, continue_final_message=True).endswith("assistant\nWell, ")
    trimmed = CHATML.replace("m.content", "m.content | trim")
    assert chat(trimmed, *turns, continue_final_message=True).endswith("assistant\nWell,")
    parts = said([{"type": "text", "text": "We"}, {"type": "image"}], "assistant")
    template = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}<end>{% endfor %}"
    assert chat(template, parts, continue_final_message=True) == "We"
    for options, pattern in (
        ({"continue_final_message": True, "add_generation_prompt": True}, "goes on with the last turn and add_gener"),
        ({"continue_final_message": "thoughts"}, "the last message has no text 'thoughts' to continue"),
    ):
        with pytest.raises(ValueError, match=pattern):
            chat(CHATML, *turns, **options)
    with pytest.raises(ValueError, match="'default' does not show 'content' as it is"):
        chat("{{ messages[0].role }}", *turns, continue_final_message=True)


def test_a_template_may_be_given():
    assert chat("nothing", said("hi"), chat_template="X{{ messages[0].content }}") == "Xhi"


def test_ids():
    tokenizer = Tokenizer(byte_level(), {"bos_token": "<s>"}, {"default": "{{ bos_token }}{{ messages[0].content }}"})
    ids = [0, *tokenizer.encode("fox", add_special_tokens=False)]
    assert tokenizer.apply_chat_template([said("fox")], tokenize=True) == ids
    assert tokenizer.encode(tokenizer.apply_chat_template([said("fox")])) == ids  # no second BOS
    whole = tokenizer.apply_chat_template([said("fox")], tokenize=True, return_dict=True)
    assert whole == {"input_ids": ids, "attention_mask": [1] * len(ids)}
    assert tokenizer.apply_chat_template([[said("fox")], [said("a")]], tokenize=True)[0] == ids


def test_variables_reach_the_template_or_are_refused():
    template = "{{ 'fast' if not enable_thinking }}"
    assert chat(template, said("hi"), chat_template_kwargs={"enable_thinking": False}) == "fast"
    assert chat(template, said("hi"), enable_thinking=True) == ""
    for options in (
        {"enable_thoughts": False},
        {"chat_template_kwargs": {"enable_thoughts": False}},
        {"padding": True},
        {"return_tensors": "np"},
        {"tools": TOOLS},
        {"documents": [{"title": "x"}]},
    ):
        (name,) = options.get("chat_template_kwargs", options)
        with pytest.raises(ValueError, match=rf"template does not read {name}; .* \(it reads enable_thinking\)"):
            chat(template, said("hi"), **options)


CALLS = (
    "{% for c in messages[0].tool_calls %}{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}"
)
CALLS += "{% endfor %}"


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        (CALLS, '{"a": 1}', "a=1;"),
        (CALLS, {"a": 1}, "a=1;"),
        ("{{ messages[0].tool_calls[0].function.arguments | tojson }}", '{"a":1}', '{"a": 1}'),
        ("{{ 'f' + messages[0].tool_calls[0].function.arguments }}", '{"a":1}', 'f{"a":1}'),
        (
            "{% set c = messages[0].tool_calls[0].function %}{{ c.arguments if c.arguments is string else 'x' }}",
            '{"a":1}',
            '{"a":1}',
        ),
    ],
)
def test_arguments_of_tool_calls_may_be_json(template, arguments, expected):
    assert chat(template, said("", "assistant", tool_calls=[{"function": {"arguments": arguments}}])) == expected


@pytest.mark.parametrize("given", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("read", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_by_any_name(given, read):
    assert chat("{{ messages[0]." + read + " }}", {"role": "assistant", given: "So"}) == "So"


@pytest.mark.parametrize(
    ("template", "message", "pattern"),
    [
        ("a\n{{ messages[0].content + '!' }}", said(["x"]), r"'default' refuses .*: TypeError: .*list.* \(line 2\)"),
        ("\n\n{{ nothing.at_all }}", said("x"), r"refuses these messages: 'nothing' is undefined \(line 3\)"),
        ("{{ nothing | tojson }}", said("x"), r"TypeError: .*Undefined is not JSON serializable \(line 1\)"),
        ("{% macro f(x) %}\n{{ 1 // x }}{% endmacro %}{{ f(0) }}", said("x"), r"ZeroDivisionError: .* \(line 2\)"),
        (CALLS, said("", tool_calls=[{"function": {"arguments": "no JSON"}}]), r"refuses .* \(line 1\)"),
        ("{{ 'x'.encode('nothing') }}", said("x"), "LookupError: unknown encoding: nothing"),
        ("{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}", said("x"), "'default' does not parse: it is nested too deeply"),
        ("a\n{{ x | nothing }}", said("x"), "'default' does not parse at line 2: No filter named 'nothing'"),
    ],
)
def test_every_failure_names_template_and_line(template, message, pattern):
    with pytest.raises(ValueError, match=pattern):
        chat(template, message)


LONG = "{% set s = 'b' * 1000000 %}"
DOUBLING = "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        ("{% for i in range(99999) %}\n{% for j in range(99999) %}{% endfor %}{% endfor %}", r"than 0\.1 sec.*line 2"),
        ("{% macro f() %}{{ f() if x else f() }}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n }}{% endmacro %}{{ f(60) }}", r"more than 0\.1 seconds"),
        ("{{ 'a' * 10 ** 10 }}", "a text or list of more than 10,000,000 characters or items"),
        ("{{ [1] * 10 ** 10 }}", "a text or list"),
        ("{{ 10 ** 9999 }}", "an integer of more than 1,000 digits"),
        (DOUBLING, "a text or list"),
        (DOUBLING.replace("~", "+"), "a text or list"),
        (DOUBLING.replace("n.x ~ n.x", "[n.x, n.x]"), "a text or list|seconds"),
        (LONG + "{% for i in range(99999) %}{{ s }}{% endfor %}", "a text or list"),
        (LONG + "{% set x %}{% for i in range(99) %}{{ s }}{% endfor %}{% endset %}", "a text or list"),
        (LONG + "{{ range(99) | join(s) }}{{ s.join(['a'] * 99) }}", "a text or list"),
        (LONG + "{{ s.join(['a'] * 99) }}", "a text or list"),
        (LONG + "{{ s | replace('b', s) }}", "a text or list"),
        (LONG + "{{ s | indent(99) }}", "a text or list"),
        ("{{ 'a'.ljust(10 ** 10) }}", "ljust takes numbers up to 100,000"),
        ("{{ [1] | batch(10 ** 10, 1) | list }}", "batch takes numbers up to 100,000"),
        ("{{ 1 .to_bytes(10 ** 10) }}", "to_bytes takes numbers up to 100,000"),
        ("{{ 'a'.encode() }}", "it makes bytes"),
        ("{{ '%9999999d' % 1 }}", "the format '%9999999d' has a width that is large"),
        ("{{ '{:{}}'.format(1, 99999) }}", "has a width that is large or not written out"),
    ],
)
def test_templates_are_bounded(template, pattern, monkeypatch):
    monkeypatch.setattr("ridgeline.model.tokenizer.sandbox.SECONDS", 0.1)
    with pytest.raises(ValueError, match=f"'default' refuses these messages: .*({pattern})"):
        chat(template, said("x"))


@pytest.mark.parametrize("template", ["{% for i in x %}" * 30 + "{% endfor %}" * 30, "{{ " + "9" * 5000 + " }}"])
def test_templates_that_do_not_parse(template):
    with pytest.raises(ValueError, match="chat template 'default' does not parse"):
        chat(template, said("x"))


# --- functions as tools ---


class Color(enum.Enum):
    RED, BLUE = "red", 2


def paint(color: Color, size: int | float = 1, where: tuple[int, int] = (0, 0), more: dict[str, bool] | None = None):
    """Paints.

    Args:
      color: which (choices: ["red", "blue"])
      size: how large
      where: at what place
      more: anything
    """


def either(value: str | list[str], thing: Any) -> bytes:
    """Either.

    Args:
        value: one or many
        thing: of any type

    Raises:
        ValueError: never
    """


@pytest.mark.parametrize("function", [add, paint, either])
def test_schemas_of_functions_are_those_of_transformers(function):
    utilities = pytest.importorskip("transformers.utils")
    assert function_schema(function) == utilities.get_json_schema(function)


def test_a_function_as_a_tool():
    schema = function_schema(add)["function"]
    assert schema["parameters"]["properties"]["how"] == {
        "type": "string",
        "enum": ["up", "down"],
        "description": "which way to round",
    }
    assert schema["parameters"]["required"] == ["x"]
    assert chat("{{ tools[0].function.name }}", said("hi"), tools=[add]) == "add"


def undocumented(x: int):
    pass


def half(x: int, y):
    """Half.

    Args:
        x: one
        y: two
    """


def undefined(x: "Nothing"):
    """Undefined.

    Args:
        x: one
    """


def odd(x: bytes):
    """Odd.

    Args:
        x: one
    """


@pytest.mark.parametrize(
    ("tool", "pattern"),
    [
        (undocumented, "function 'undocumented' is a tool and has no docstring"),
        (half, "parameter 'y' of function 'half', a tool, has no type hint; add it"),
        (odd, "parameter 'x' of function 'odd', a tool, has type <class 'bytes'>, which has no JSON schema"),
        (undefined, "type hints of 'undefined', which is a tool, cannot be read: name 'Nothing'"),
        (functools.partial(add, 1), "type hints of 'functools.partial.*, which is a tool, cannot be read"),
        (3, "tool 3 is neither a JSON schema, which is a mapping, nor a function"),
    ],
)
def test_functions_that_are_no_tools(tool, pattern):
    with pytest.raises(ValueError, match=pattern):
        chat("{{ tools }}", said("hi"), tools=[tool])
