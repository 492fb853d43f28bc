"""The `ridgeline` command, in this process where possible and as a process where its end matters."""

import contextlib
import dataclasses
import io
import json
import os
import re
import readline
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from rich.console import Console

import ridgeline as rl
from ridgeline.benchmarks.servers import counted_compilations
from ridgeline.cli import batch, chat, common, main
from ridgeline.cli.formats import print_json
from tiny import byte_tokenizer, tiny_model

RUN = [sys.executable, "-m", "ridgeline"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Run as a user's process does, and share the tests' compiled programs."""
    return os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}


def test_generate_streams_a_text_and_tells_its_speed(capsys):
    assert main(["generate", "Once upon a time", "--max-tokens", "24", "--seed", "1"]) == 0
    first = capsys.readouterr()
    assert len(first.out.split()) > 5
    for part in ("prompt tokens", "24 new tokens", "TTFT", "TPOT", "tokens/s"):
        assert part in first.err
    main(["generate", "Once upon a time", "--max-tokens", "24", "--seed", "1"])
    assert capsys.readouterr().out == first.out


def test_a_draft_changes_no_token(capsys, tmp_path):
    options = ["--max-tokens", "24", "--seed", "1", "--dtype", "float32", "--json"]
    results = []
    for draft in ([], ["--draft", "ngram"], ["--draft", "bundled-draft", "--draft-tokens", "3"]):
        assert main(["generate", "Once upon a time", *options, *draft]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert len({tuple(result["tokens"]) for result in results}) == 1
    assert [result["drafted"] > 0 for result in results] == [False, True, True]
    assert main(["generate", "x", "--draft", "ngram", "--draft-tokens", "16"]) == 2
    assert "tokens is 16; a drafter guesses 1 to 15" in capsys.readouterr().err


def test_every_sampling_option_reaches_the_request(capsys, tmp_path):
    (tmp_path / "prompt.txt").write_text("The old king", encoding="utf-8")
    options = (
        "--temperature 0.9 --top-k 40 --top-p 0.95 --min-p 0.01 --repetition-penalty 1.1 --presence-penalty 0.1 "
        "--frequency-penalty 0.1 --logit-bias 5=-3 --logit-bias 7=2.5 --seed 3 --stop-token-ids 9 --min-tokens 2 "
        "--ignore-eos --logprobs 2 --max-tokens 12 --json --model bundled --dtype float32"
    )
    args = ["generate", "--file", str(tmp_path / "prompt.txt"), *options.split(), "--stop", "zzz"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["prompt"] == "The old king"
    assert result["seed"] == 3
    assert result["finish_reason"] in ("length", "stop")
    assert len(result["logprobs"]) == len(result["tokens"]) == result["usage"]["new_tokens"]
    assert len(result["logprobs"][0]["top"]) == 2
    assert set(result["usage"]) >= {"prompt_tokens", "ttft_seconds", "tpot_seconds", "tokens_per_second"}
    assert "new tokens" in err


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["generate"], 2, "give a PROMPT"),
        (["generate", "x", "--file", "y"], 2, "one of them"),
        (["generate", "--file", "absent.txt"], 2, "absent.txt"),
        (["generate", ""], 2, "prompt 0 is empty"),
        (["generate", "x", "--top-p", "0"], 2, "top_p is 0.0"),
        (["generate", "x", "--temperature", "nan"], 2, "temperature is nan"),
        (["generate", "x", "--max-tokens", "0"], 2, "max_tokens is 0"),
        (["generate", "x", "--n", "2", "--temperature", "0"], 2, "n is 2, and temperature 0.0 gives one text"),
        (["generate", "x", "--logit-bias", "5"], 2, "not ID=BIAS"),
        (["generate", "x", "--logit-bias", "99999=1"], 2, "99999"),
        (["generate", "x", "--model", "absent"], 1, "no such directory: absent"),
        (["generate", "x", "--model", "./some/name"], 1, "no such directory: some/name"),
        (["generate", "x", "--tensor", "4096"], 2, "needs 4096 devices"),
        (["chat", "--frobnicate"], 2, "frobnicate"),
        ([], 2, "COMMAND"),
        (["generate", "word " * 9000], 2, "shorten the prompt"),
    ],
)
def test_user_errors_are_one_line_without_a_traceback(capsys, args, code, message):
    assert main(args) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_completion_is_of_all_commands_where_shtab_is_installed(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["--completion", "bash"]) == 2
    assert "pip install 'ridgeline[completion]'" in capsys.readouterr().err

    def complete(parser, shell):
        return f"{shell}: {parser.format_help()} {parser.parse_args(['bench', 'decode']).model}"

    monkeypatch.setitem(sys.modules, "shtab", types.SimpleNamespace(complete=complete))
    assert main(["--completion", "zsh"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("zsh: usage: ridgeline")
    assert out.endswith("bundled\n")


def test_help_and_version(capsys):
    assert main(["--help"]) == 0
    assert 'ridgeline generate "Once upon a time"' in capsys.readouterr().out
    assert main(["generate", "--help"]) == 0
    assert "--temperature" in capsys.readouterr().out
    assert main(["--version"]) == 0


def test_standard_input_and_json_chat(environment):
    piped = subprocess.run(
        [*RUN, "generate", "-", "--max-tokens", "8", "--seed", "1"],
        input="There was once", capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert (piped.returncode, bool(piped.stdout.strip())) == (0, True), piped.stderr
    chat = subprocess.run(
        [*RUN, "chat", "--max-tokens", "8", "--seed", "1", "--json"],
        input="Once upon a time\nand then\n/reset\nOnce upon a time\n/exit\nunread\n",
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert chat.returncode == 0, chat.stderr
    first, second, third = [json.loads(line) for line in chat.stdout.splitlines()]
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]  # it has the first turn before it
    assert (third["text"], third["seed"]) == (first["text"], 1)


def test_ctrl_c_ends_cleanly_with_what_there_is(environment):
    process = subprocess.Popen(
        [*RUN, "generate", "Once upon a time", "--max-tokens", "480", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    started = process.stdout.read(1)  # the first text is there
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert started + out
    (line,) = err.decode().splitlines()
    assert line.endswith("interrupted")


IMPORTING = """
import time
print("here", flush=True)
time.sleep(600)
"""
COMPILING = """
import hashlib
from ridgeline import cli
def main():
    print("here", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # hears no signal, as XLA's compiler
cli.main = main
cli.command()
"""
RUNNING = """
import time
from concurrent.futures import ThreadPoolExecutor
from ridgeline import cli
def work(args):
    ThreadPoolExecutor().submit(time.sleep, 600)  # as a compiler beside it
    try:
        print("here", flush=True)
        time.sleep(600)
    finally:
        print("cleaned up")
cli.generate.run = work
cli.command()
"""


@pytest.mark.parametrize(
    ("files", "args", "out"),
    [
        ({"jax.py": IMPORTING}, [*RUN[1:], "generate", "x"], ""),
        ({"program.py": COMPILING}, ["program.py"], ""),
        ({"program.py": RUNNING}, ["program.py", "generate", "x"], "cleaned up\n"),
    ],
    ids=["importing", "compiling", "running"],
)
def test_ctrl_c_anywhere_is_exit_code_130_and_one_line(environment, tmp_path, files, args, out):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    path = os.pathsep.join(filter(None, [str(tmp_path), environment.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment | {"PYTHONPATH": path}, cwd=tmp_path,
    )  # fmt: skip
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (out, "ridgeline: interrupted\n")
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_error(environment):
    process = subprocess.Popen(
        [*RUN, "generate", "Once upon a time", "--max-tokens", "400", "--ignore-eos"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment,
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.returncode == 0
    assert b"Traceback" not in process.stderr.read()


def test_each_turn_of_a_chat_finds_the_turns_before_it_in_the_cache(monkeypatch, capsys):
    lines = iter(["The old king " * 40, "and then", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", "--max-tokens", "8", "--seed", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    first, second = [json.loads(line)["usage"] for line in out.splitlines()]
    assert first["cached_tokens"] == 0
    assert 64 <= second["cached_tokens"] <= first["prompt_tokens"] + 8 < second["prompt_tokens"]
    assert f"{second['cached_tokens']} found in the cache" in err


def write_lines(tmp_path, *values):
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(value if isinstance(value, str) else json.dumps(value) for value in values))
    return str(file)


def test_many_prompts_run_together_and_are_printed_in_their_order(capsys, tmp_path):
    shared = "Once upon a time there was a king. " * 12
    file = write_lines(
        tmp_path,
        json.dumps(shared + "He"),
        "",
        {"prompt": "The old", "max_tokens": 2, "logit_bias": {"5": 1}, "logprobs": 1},
        {"messages": [{"role": "user", "content": "Hello"}], "seed": 7},
        {"prompt": [5, 6, 7], "temperature": 0},
        {"prompt": shared + "She", "stop": "zzz"},
    )
    args = ["generate", "--file", file, "--max-tokens", "9", "--seed", "1", "--ignore-eos", "--dtype", "float32"]
    assert main(args) == 0
    out, err = capsys.readouterr()
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["prompt"] for result in results[1::2]] == ["The old", [5, 6, 7]]
    assert [result["usage"]["new_tokens"] for result in results] == [9, 2, 9, 9, 9]
    assert [result["seed"] for result in results] == [1, 1, 7, 1, 1]
    assert len(results[1]["logprobs"]) == 2
    assert results[0]["logprobs"] is None
    assert "5 finished, 0 running, 0 waiting" in err
    assert "prefix hits" in err
    assert main(["generate", shared + "She", *args[3:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == results[-1]["tokens"]  # as it is alone


def test_samples_are_printed_one_after_the_other(capsys, tmp_path):
    options = ["--max-tokens", "5", "--seed", "7", "--temperature", "1", "--ignore-eos", "--dtype", "float32"]
    assert main(["generate", "The old", "--n", "2", *options, "--json"]) == 0
    samples = json.loads(capsys.readouterr().out)
    assert [(sample["prompt"], sample["seed"]) for sample in samples] == [("The old", 7), ("The old", 8)]
    assert main(["generate", "The old", "--n", "2", *options]) == 0
    assert capsys.readouterr().out == "".join(sample["text"] + "\n\n" for sample in samples)
    assert main(["generate", "--file", write_lines(tmp_path, {"prompt": "The old", "n": 2}, '"A"'), *options]) == 0
    of_line, alone = map(json.loads, capsys.readouterr().out.splitlines())
    assert [sample["text"] for sample in of_line] == [sample["text"] for sample in samples]
    assert alone["prompt"] == "A"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Once upon", "is no JSON"),
        ("7", "a text in quotes, or an object"),
        ('{"prompt": "x", "messages": []}', 'with "prompt" or "messages"'),
        ('{"messages": ["hello"]}', '"messages" must be a list of objects'),
        ('{"prompt": 5}', '"prompt" must be a text'),
        ('{"prompt": "x", "temprature": 1}', "there is no field 'temprature'"),
        ('{"prompt": "x", "top_p": 0}', "top_p is 0"),
        ('{"prompt": ""}', "is empty"),
        ('{"prompt": [99999]}', "token id 99999"),
    ],
)
def test_a_bad_line_of_prompts_is_told_with_its_number(capsys, tmp_path, line, message):
    assert main(["generate", "--file", write_lines(tmp_path, '"Once"', line)]) == 2
    err = capsys.readouterr().err
    assert "prompts.jsonl, line 2" in err
    assert message in err


def test_terminals_show_a_line_meanwhile_and_texts_in_the_end(monkeypatch, tmp_path):
    screen = io.StringIO()
    monkeypatch.setattr(batch, "terminal", lambda stderr=False: Console(file=screen, force_terminal=True, width=120))
    monkeypatch.setattr(batch, "_REFRESH", 0.0)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    file = write_lines(tmp_path, '"Once upon a time"', '"The old king"')
    assert main(["generate", "--file", file, "--max-tokens", "9", "--seed", "1", "--dtype", "float32"]) == 0
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", screen.getvalue())
    assert "0 finished, 2 running, 0 waiting" in shown
    line, texts = shown.rsplit("2 finished, 0 running, 0 waiting", 1)
    assert "Once upon a time" not in line
    assert 0 < texts.index("Once upon a time") < texts.index("The old king")


def test_ctrl_c_keeps_what_was_finished(monkeypatch, model):
    pressed = threading.Event()
    monkeypatch.setattr(batch, "ctrl_c", lambda: contextlib.nullcontext(pressed))
    with rl.Engine(model, 2, max_length=128, whole_batches=True) as engine:
        for max_tokens in (1, 60, 60):
            engine.submit([1, 2, 3], rl.SamplingParams(max_tokens=max_tokens))
        reasons = {}
        for index, output in batch.finished(engine, 3):
            reasons[index] = output.finish_reason
            pressed.set()
    assert reasons == {0: "length", 1: "abort", 2: "abort"}


def test_results_keep_their_order_and_come_as_early_as_they_can():
    came = []

    def outputs():
        for index in (1, 0, 3, 2):
            came.append(index)
            yield index, f"output {index}"

    assert [(output, len(came)) for output in batch.in_order(outputs())] == [
        ("output 0", 2),
        ("output 1", 2),
        ("output 2", 4),
        ("output 3", 4),
    ]


def test_a_conversation_that_grows_too_long_goes_on_after_a_reset(monkeypatch, capsys):
    lines = iter(["word " * 1200, "/reset", "Once upon a time", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt="": next(lines))
    assert main(["chat", "--max-tokens", "8", "--seed", "1"]) == 0
    out, err = capsys.readouterr()
    assert "shorten the prompt; /reset starts over" in err
    assert "8 new tokens" in err
    assert out.strip()


def test_warnings_are_lines_on_standard_error(capsys):
    assert main(["generate", "Once", "--max-tokens", "99999", "--seed", "1", "--stop", "."]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "max_tokens 99999" in line]
    assert len(told) == 1
    assert told[0].startswith("ridgeline: prompt 0 has ")


def talk(monkeypatch, *lines):
    """What a chat is told, at whose end a terminal ends the input."""
    lines = iter(lines)

    def read(prompt=""):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)


def test_no_turn_of_a_chat_compiles_anything_however_long_it_grows(monkeypatch, capsys):
    lines, counts = ["The old king " * length for length in (1, 30, 90, 2)], []
    with counted_compilations() as count:

        def read(prompt=""):
            counts.append(count())
            if not lines:
                raise EOFError
            return lines.pop(0)

        monkeypatch.setattr("builtins.input", read)
        assert main(["chat", "--max-tokens", "40", "--ignore-eos", "--seed", "1", "--dtype", "float32"]) == 0
    assert counts[0] > 0
    assert counts == [counts[0]] * 5
    turns = [line for line in capsys.readouterr().err.splitlines() if "TTFT" in line]
    assert len(turns) == 4
    assert all("found in the cache" in line for line in turns)


def test_the_commands_of_a_chat(monkeypatch, capsys):
    talk(monkeypatch, "/help", "/frobnicate now", "", " /is no command", "/quit", "unread")
    assert main(["chat", "--max-tokens", "8", "--seed", "1", "--logprobs", "2"]) == 0
    out, err = capsys.readouterr()
    assert err.count("/reset starts over, /quit or /exit leaves") == 2
    assert "there is no command /frobnicate" in err
    assert err.count("new tokens") == 1
    assert len([line for line in out.splitlines() if re.match(r' *".*" +-\d', line)]) == 8


def test_a_chat_without_a_template_is_refused_before_the_first_message(monkeypatch, capsys):
    talk(monkeypatch, "Hello")
    model = dataclasses.replace(tiny_model(), tokenizer=byte_tokenizer())
    monkeypatch.setattr(common, "open_model", lambda *_, **__: (model, lambda: model))
    assert main(["chat"]) == 2
    assert "no chat template" in capsys.readouterr().err


def test_lines_of_a_chat_are_kept_for_the_next(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with chat.line_editing():
        readline.add_history("Once upon a time")
    readline.clear_history()
    with chat.line_editing():
        assert readline.get_history_item(readline.get_current_history_length()) == "Once upon a time"
    assert (tmp_path / "ridgeline" / "chat_history").read_text().split("\n")[-2] == "Once upon a time"


def test_ctrl_c_ends_a_reply_and_keeps_the_conversation(monkeypatch, capsys):
    lines = ["Once upon a time", "and then"]

    def read(prompt=""):
        if not lines:
            raise KeyboardInterrupt  # at the prompt, which it leaves
        return lines.pop(0)

    step, steps = rl.Engine.step, []

    def interrupted(engine):
        steps.append(engine)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(engine)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(rl.Engine, "step", interrupted)
    assert main(["chat", "--max-tokens", "40", "--ignore-eos", "--seed", "1", "--json"]) == 130
    out, err = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["finish_reason"] == "abort"
    assert 0 < first["usage"]["new_tokens"] < 40
    assert second["usage"]["new_tokens"] == 40
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"] + first["usage"]["new_tokens"]
    assert err.splitlines()[-1] == "ridgeline: interrupted"


def test_log_probabilities_are_a_table_after_the_text(capsys, monkeypatch):
    encoded, encode = [], rl.Tokenizer.encode

    def recorded(self, text, *rest, **options):
        encoded.append(text)
        return encode(self, text, *rest, **options)

    monkeypatch.setattr(rl.Tokenizer, "encode", recorded)
    args = ["generate", "Once upon a time", "--max-tokens", "5", "--seed", "1", "--logprobs", "2"]
    assert main(args) == 0
    assert encoded.count("Once upon a time") == 1
    shown = capsys.readouterr().out
    assert main([*args, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    rows = [line for line in shown.splitlines() if re.match(r' *".*" +-\d', line)]
    assert [float(row.split('"')[2].split()[0]) for row in rows] == [
        round(each["logprob"], 3) for each in result["logprobs"]
    ]
    assert all(row.count('"') == 6 for row in rows)


def test_json_has_no_nan_and_only_characters_that_its_reader_takes(monkeypatch):
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    print_json({"a": [float("nan"), (1.5, -float("inf"))], "b": "é"})
    assert written.buffer.getvalue() == b'{"a": [null, [1.5, null]], "b": "\\u00e9"}\n'


def test_text_that_is_none_and_terminals_that_lack_characters(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb"), encoding="utf-8"))
    assert main(["generate", "-"]) == 2
    assert "the text has byte 0xff, which is not UTF-8, at 1" in capsys.readouterr().err
    written = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", written)
    assert main(["generate", "The", "--logit-bias", "160=100", "--max-tokens", "2", "--temperature", "0"]) == 0
    written.flush()
    assert rb"\ufffd" in written.buffer.getvalue()
