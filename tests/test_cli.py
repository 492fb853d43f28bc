"""The `ridgeline` command, in this process where possible and as a process where its end matters."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from ridgeline.cli import main

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
        (["generate", "x", "--model", "some/name"], 1, "download it first"),
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
