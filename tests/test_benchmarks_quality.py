"""The table of what each scheme costs: rows, what they are counted in, and what is refused."""

import json

import pytest

import ridgeline as rl
from ridgeline.benchmarks import quality
from ridgeline.cli import main


def test_quality_table_is_measured_stored_and_drawn(capsys, monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "KV_SCHEMES", ("int8",))
    book = "\n\n".join(f"The {name} went into the wood and did not come out again." for name in "ABCDEFGHIJKLMN" * 6)
    (tmp_path / "books.txt").write_text(book)
    out, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    arguments = ["--text", str(tmp_path / "books.txt"), "--output", str(out), "--plot", str(picture)]
    arguments += ["--model", "bundled-draft", "--weights", "bfloat16/int8+int8", "--limit", "20"]
    assert main(["bench", "quality", *arguments]) == 0
    assert "bfloat16/int8+int8" in capsys.readouterr().out
    assert picture.stat().st_size > 0
    report = json.loads(out.read_text())
    assert report["command"].startswith("ridgeline bench quality --text books.txt")
    plain, found = report["rows"]
    assert [row["weights"] for row in (plain, found)] == ["bfloat16", "bfloat16/int8+int8"]
    assert {row["kv"] for row in report["rows"]} == {"int8"}
    config = rl.load_model("bundled-draft").config
    assert plain["parameter_bytes"] == 2 * rl.count_parameters(config)  # the embedding is the output projection
    assert 0.5 < found["parameter_bytes"] / plain["parameter_bytes"] < 0.6  # scales, and one row of the embedding
    assert found["kv_bytes"] == 2 * config.num_layers * config.num_kv_heads * (config.head_dim + 4)
    assert plain["loss_delta_bfloat16"] == 0
    assert found["loss_delta_bfloat16"] == found["loss"] / plain["loss"] - 1
    assert all(row["tokens"] == 20 and abs(row["loss_delta"]) < 0.01 for row in report["rows"])


def test_quality_table_names_the_schemes_it_knows(capsys):
    assert main(["bench", "quality", "--text", "t", "--weights", "int3"]) == 2
    assert "--weights 'int3' is not known; known: float32, bfloat16, bfloat16/int8" in capsys.readouterr().err
