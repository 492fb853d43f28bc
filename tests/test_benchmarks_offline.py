"""`bench latency` and `bench throughput` in vllm's terms, and results as flat rows."""

import csv
import io
import json

import pytest

from ridgeline.benchmarks.harness import flat_rows
from ridgeline.cli import main

SIZES = ["--input-len", "20", "--output-len", "4"]


def test_latency_has_the_lines_and_keys_of_vllm(tmp_path, capsys):
    file = tmp_path / "latency.json"
    sizes = [
        "--input-len",
        "20",
        "--output-len",
        "4",
        "--batch-size",
        "2",
        "--num-iters",
        "4",
        "--num-iters-warmup",
        "1",
    ]
    assert main(["bench", "latency", *sizes, "--output", str(file)]) == 0
    stored, lines = json.loads(file.read_text()), capsys.readouterr().out.splitlines()
    assert len(stored["latencies"]) == 4
    assert stored["avg_latency"] == pytest.approx(sum(stored["latencies"]) / 4)
    assert list(stored["percentiles"]) == ["10", "25", "50", "75", "90", "99"]
    assert lines[0] == f"Avg latency: {stored['avg_latency']} seconds"
    assert lines[3] == f"50% percentile latency: {stored['percentiles']['50']} seconds"


def test_throughput_in_csv_and_json_lines(tmp_path, capsys):
    file = tmp_path / "throughput.json"
    command = [
        "bench",
        "throughput",
        "--num-prompts",
        "3",
        "--input-len",
        "20",
        "--output-len",
        "4",
        "--max-num-seqs",
        "2",
    ]
    assert main([*command, "--output", str(file), "--format", "csv"]) == 0
    printed = capsys.readouterr()
    (row,) = csv.DictReader(io.StringIO(printed.out))
    stored = json.loads(file.read_text())
    assert (row["num_requests"], row["total_num_tokens"], row["model.dtype"]) == ("3", str(3 * 24), "bfloat16")
    assert float(row["requests_per_second"]) == stored["requests_per_second"] == 3 / stored["elapsed_time"]
    assert {"commit", "flags", "hardware.cpu", "versions.jax"} <= row.keys()
    assert "throughput: " in printed.err


def test_a_row_a_measurement_with_every_setting():
    spread = {"median": 2.0, "min": 1.0, "max": 3.0, "runs": [1.0, 2.0, 3.0]}
    report = {
        "device": "cpu",
        "model": {"name": "m"},
        "rows": [{"batch": 1, "s": spread}, {"batch": 2}],
        "figures": [{}],
    }
    first, second = flat_rows(report)
    settings = {"device": "cpu", "model.name": "m", "measurement": "rows"}
    assert first == settings | {"batch": 1, "s.median": 2.0, "s.min": 1.0, "s.max": 3.0}
    assert second == settings | {"batch": 2}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["latency", "--input-len", "0"], "--input_len is 0"),
        (["throughput", "--num-prompts", "0"], "--num_prompts is 0"),
        (["latency", "--output-len", "5000"], "the model takes 1024"),
    ],
)
def test_bad_usage(capsys, arguments, told):
    assert main(["bench", *arguments]) == 2
    assert told in capsys.readouterr().err
