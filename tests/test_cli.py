"""The `ridgeline` command, in this process where possible and as a process where its end matters."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import jax
import pytest
from rich.console import Console

import ridgeline as rl
from ridgeline.cli import batch, main
from ridgeline.cli.formats import print_json

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
    assert process.returncode == 0, err
    assert started + out
    assert b"interrupted" in err
    assert b"Traceback" not in err


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
