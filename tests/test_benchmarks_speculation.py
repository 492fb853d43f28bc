"""`bench speculation`: acceptance, rounds and ratios of every drafter, kind of text and number of tokens."""

import json

import pytest

from ridgeline.benchmarks.harness import flat_rows
from ridgeline.cli import main

FEW = ["bundled-draft", "--draft", "bundled-draft", "--max-tokens", "12", "--rounds", "1", "--dtype", "float32"]


def test_every_drafter_on_every_kind(tmp_path, capsys):
    file, prompts = tmp_path / "out.json", tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"kind": "chat", "prompt": "Who is there?"}\n{"kind": "lists", "prompt": "One bee, two bees, three bees,"}\n'
    )
    command = ["bench", "speculation", *FEW, "--tokens", "3", "--prompts", str(prompts)]
    assert main([*command, "--output", str(file)]) == 0
    stored, printed = json.loads(file.read_text()), capsys.readouterr().out
    how = {(row["kind"], row["drafter"], row["tokens"]) for row in stored["rows"]}
    assert how == {(kind, drafter, 3) for kind in ("chat", "lists") for drafter in ("n-gram", "draft model")}
    for row in stored["rows"]:
        assert row["same_tokens"]
        assert list(row["acceptance"]) == ["1", "2", "3"]
        if row["drafter"] == "draft model":  # the model itself: right but for where there is no room
            assert set(row["acceptance"].values()) == {1.0}
            assert row["tokens_per_round"] == pytest.approx(11 / 3)
        assert row["speedup"]["median"] == pytest.approx(row["plain_seconds_per_token"] / row["seconds_per_token"])
    assert {(one["model"], one["batch"]) for one in stored["predicted"]} == {
        (model, batch) for model in ("llama-3.1-8b", "llama-3.1-70b") for batch in (1, 32)
    }
    assert all(0.2 < one["speedup"] < 4 for one in stored["predicted"])
    assert "accepted by place" in printed
    rows = list(flat_rows(stored))
    assert {row["measurement"] for row in rows} == {"rows", "predicted"}
    assert {"acceptance.1", "acceptance.3", "speedup.median", "temperature", "versions.jax"} <= rows[0].keys()


def test_what_is_refused(tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"kind": "chat"}\n')
    for arguments, told in (
        (["--prompts", str(prompts)], "line 1: expected"),
        (["--tokens", "0,3"], "--tokens are [0, 3]; each must be 1 to 15"),
        (["llama-3.2-1b"], "llama-3.2-1b"),
    ):
        assert main(["bench", "speculation", *arguments]) != 0
        assert told in capsys.readouterr().err
