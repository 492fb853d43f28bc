"""`ridgeline compile`, with a model small enough to compile at once."""

import json

import pytest

from ridgeline.cli import main
from ridgeline.model.presets import PRESETS
from ridgeline.sharding import targets


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory with the config.json of a Llama of two layers, and nothing else."""
    directory = tmp_path_factory.mktemp("small")
    changes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (directory / "config.json").write_text(json.dumps(PRESETS["llama-3.1-8b"] | changes | heads))
    return directory


def compile_json(capsys, *args):
    assert main(["compile", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_bytes_are_those_of_one_device(plugin, capsys, small):
    report = compile_json(capsys, small, "--devices", 4, "--batch", 4, "--context", 256, "--prompt", 50)
    assert report["dtype"] == "bfloat16"
    split = 2 * (512 * 256) + 2 * (4 * 4 * 64 * 256 + 256 * 8 * 64 + 2 * 512 * 256 + 256 * 512)
    norms = 5 * 256
    assert report["weight_bytes"] == 2 * (split // 4 + norms)
    pages = 2 * 2 * 4 * 256 * 4 * 64 * 2 // 4  # k and v, layers, rows, positions, heads, dimensions, bytes, devices
    assert report["cache_bytes"] == pages + 3 * 4 * 4  # lengths, room and contexts of the rows
    prefill, decode = report["programs"]["prefill"], report["programs"]["decode"]
    assert (prefill["tokens"], decode["tokens"]) == (64, 1)
    for program in (prefill, decode):
        assert program["alias_bytes"] == report["cache_bytes"]
        assert program["fits"]
        assert program["peak_bytes"] >= report["weight_bytes"] + report["cache_bytes"] + program["temporary_bytes"]
        assert [(found["kind"], found["count"]) for found in program["collectives"]] == [("all-reduce", 5)]
    assert decode["collectives"][0]["bytes"] == 5 * 4 * 256 * 2  # of every row, in bfloat16


def test_more_devices_than_kv_heads_copy_them(plugin, capsys, small):
    report = compile_json(capsys, small, "--devices", 8, "--batch", 2, "--context", 64, "--target", "h100")
    # Of four KV heads each of eight devices holds a whole one.
    pages = 2 * 2 * 2 * 64 * 64 * 2
    assert report["cache_bytes"] == pages + 4 * (2 + 2 + 2)


def test_the_table_has_both_programs_and_every_line(plugin, capsys, small):
    assert main(["compile", str(small), "--devices", "2", "--batch", "2", "--context", "128"]) == 0
    out = capsys.readouterr().out
    for part in ("prefill", "decode", "weights", "cache", "temporary", "peak", "fits", "all-reduce", "compile time"):
        assert part in out
    assert "2 x NVIDIA H200" in " ".join(out.split())  # the title wraps where the path is long
    assert main(["compile", str(small / "config.json"), "--batch", "2", "--context", "64"]) == 0
    assert "5 x, " in out


def test_what_does_not_fit_says_so(plugin, capsys, small):
    report = compile_json(capsys, small, "--batch", 8192, "--context", 131072, "--prompt", 1)
    assert report["cache_bytes"] > report["device_memory_bytes"]
    assert [program["fits"] for program in report["programs"].values()] == [False, False]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (["llama-9"], 2, "'llama-9' is no directory with a config.json and no preset; presets: gemma-2-27b"),
        (["llama-3.1-8b", "--devices", "0"], 2, "--devices is 0"),
        (["llama-3.1-8b", "--batch", "-1"], 2, "--batch is -1"),
        (["llama-3.1-8b", "--prompt", "9000"], 2, "--prompt is 9000; it must be between 1 and --context 8192"),
        (["llama-3.1-8b", "--target", "h900"], 2, "h900"),
        (["llama-3.1-8b", "--devices", "3"], 2, "size 14336 does not divide over the 3 devices"),
        (["llama-3.1-8b", "--devices", "12"], 2, "num_kv_heads 8 with 4 query heads each cannot be shared"),
    ],
)
def test_bad_arguments_are_one_line_without_a_traceback(plugin, capsys, args, code, message):
    assert main(["compile", *args]) == code
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_without_the_plugin_it_fails_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr(targets.metadata, "entry_points", lambda group: ())
    assert main(["compile", "llama-3.1-8b"]) == 1
    assert "pip install jax-cuda13-plugin==" in capsys.readouterr().err
