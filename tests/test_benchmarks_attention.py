"""The attention benchmark: what it counts, what it makes of timings, and that a wrong kernel fails it."""

import dataclasses
import json
import math

import pytest

from ridgeline.benchmarks import attention
from ridgeline.benchmarks.attention_rows import decode, prefill
from ridgeline.benchmarks.kernel_rows import BOUND
from ridgeline.cli import main
from ridgeline.roofline import Hardware


@pytest.fixture
def run(tmp_path):
    """Runs the command with arguments; returns its exit code and what it stored."""

    def run(*arguments):
        out = tmp_path / "attention.json"
        code = main(["bench", "attention", *arguments, "--output", str(out)])
        return code, json.loads(out.read_text())

    return run


@pytest.fixture
def stand_in(monkeypatch):
    """Makes a function, given the reference, stand in for the kernel."""

    def stand_in(kernel_of):
        contenders = attention.contenders

        def with_kernel(row):
            every = contenders(row)
            return every | {"mosaic": kernel_of(every["reference"])}

        monkeypatch.setattr(attention, "contenders", with_kernel)

    return stand_in


def test_bytes_and_operations_are_those_of_what_is_seen():
    row = attention.Row((100, 40), T=3, shape=(2, 4, 64), op="prefill")
    ends = [98, 99, 100, 38, 39, 40]  # positions that each new token sees
    assert row.flops == sum(ends) * 8 * 64 * 2 * 2  # two products, two operations each
    queries = 2 * 3 * 8 * 64 * 2
    assert row.bytes == 140 * 2 * 2 * 64 * 2 + 2 * queries
    quantized = attention.Row((100, 40), shape=(2, 4, 64), kv="fp8")
    assert quantized.bytes == 140 * 2 * 2 * (64 + 4) + 2 * queries // 3


def test_the_skewed_batch_and_the_even_one_move_equal_bytes():
    assert sorted(attention.SKEWED.lengths) == [4096] * 31 + [131072]
    assert attention.SKEWED.bytes == attention.EVEN.bytes
    assert {attention.SKEWED, attention.EVEN} <= set(attention.QUICK)


def test_rows_have_names_of_their_own():
    rows = [*attention.full(), *attention.TINY]
    assert len({str(row) for row in rows}) == len(rows) == len(set(rows))
    assert rows[: len(attention.QUICK)] == attention.QUICK
    assert max(row.bytes for row in rows) < 13e9  # leaves room for peers' copies


def test_on_a_cpu_it_runs_and_says_what_that_proves(run, capsys):
    code, report = run("--only", str(attention.TINY[3]), "--rounds", "2")  # the skewed one: lengths reach all
    assert code == 0
    assert report["label"] == "cpu, tiny shapes: proves the program, not the kernel"
    (row,) = report["rows"]
    assert row["why"]["mosaic"].startswith("not run: needs a Hopper GPU")
    assert row["why"]["cudnn"].startswith("failed: ")
    assert row["errors"]["xla"] < BOUND
    for name in ("reference", "xla"):
        timing = row["seconds"][name]
        assert 0 < timing["min"] <= timing["median"] <= timing["max"]
        assert len(timing["runs"]) == 2
    limit = max(
        row["bytes"] / report["roof"]["used"]["bandwidth"], row["flops"] / report["roof"]["used"]["peaks"]["bfloat16"]
    )
    (figure,) = report["figures"]
    assert figure["limit"] == pytest.approx(limit * 1e6)
    assert figure["share"] == pytest.approx(limit / row["seconds"]["reference"]["median"])
    printed = capsys.readouterr().out
    assert f"{row['seconds']['reference']['median'] * 1e6:.1f}" in printed
    assert "proves the program" in printed


def test_a_right_kernel_is_timed(run, stand_in):
    stand_in(lambda reference: reference)
    code, report = run("--only", str(attention.TINY[-1]))
    assert code == 0
    (row,) = report["rows"]
    assert row["errors"]["mosaic"] == 0.0
    assert {"mosaic", "reference"} <= row["seconds"].keys()
    assert report["figures"][0]["what"].endswith(", mosaic")


def test_a_peer_that_computes_something_else_is_not_timed(run, monkeypatch):
    monkeypatch.setattr(attention, "over_dense", lambda row, name: lambda q, operands: q)
    code, report = run("--only", str(attention.TINY[0]))
    assert code == 0
    (row,) = report["rows"]
    assert row["why"]["xla"].startswith("failed: its relative error is")
    assert row["seconds"].keys() == {"reference"}


def test_a_row_that_cannot_be_made_fails_and_the_others_go_on(run, monkeypatch, capsys):
    make = attention.make_inputs

    def no_room(row, sets):
        if row == attention.TINY[1]:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return make(row, sets)

    monkeypatch.setattr(attention, "make_inputs", no_room)
    code, report = run("--only", "decode 2 x 256")
    assert code == 1
    assert [row.get("failed") for row in report["rows"]] == [None, "RuntimeError: RESOURCE_EXHAUSTED", None]
    assert "FAILED: decode 2 x 256, 8x4x128, int8" in " ".join(capsys.readouterr().out.split())


def test_a_program_that_memory_does_not_hold_is_not_run(run, monkeypatch):
    monkeypatch.setattr("ridgeline.benchmarks.kernel_rows.MOST_BYTES", 1e6)
    code, report = run("--only", str(attention.TINY[0]))
    assert code == 0
    assert report["rows"][0]["why"]["reference"].startswith("failed: MemoryError: it would take")


@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_a_wrong_kernel_is_not_timed_and_fails_the_run(run, stand_in, factor):
    stand_in(lambda reference: lambda q, operands: reference(q, operands) * factor)
    code, report = run("--only", str(attention.TINY[2]))
    assert code == 1
    (row,) = report["rows"]
    assert "relative error" in row["failed"]
    assert "seconds" not in row


def test_a_kernel_that_does_not_run_fails_the_run(run, stand_in):
    def refuses(reference):
        def kernel(q, operands):
            raise NotImplementedError("no such case")

        return kernel

    stand_in(refuses)
    code, report = run("--only", str(attention.TINY[2]))
    assert code == 1
    assert report["rows"][0]["failed"] == "failed: NotImplementedError: no such case"


def test_rows_that_time_ran_out_for_are_named(run):
    code, report = run("--minutes", "0")
    assert code == 0
    assert [row["row"] for row in report["rows"]] == [str(row) for row in attention.TINY]
    assert {row["not_run"] for row in report["rows"]} == {"out of time"}


def timed(row, share, cudnn=None):
    """The record of a row whose kernel takes 1 s at a roof of 1 GB/s; `share` of it would be its bytes' time."""
    seconds = {"mosaic": {"median": 1.0}} | ({} if cudnn is None else {"cudnn": {"median": cudnn}})
    shape = {"op": row.op, "lengths": list(row.lengths), "kv": row.kv}
    return {"row": str(row), "bytes": share * 1e9, "flops": 0, "seconds": seconds, **shape}


def test_targets_are_met_or_not():
    long, narrow, new = decode(32, 32768), decode(32, 32768, kv="fp8"), prefill(1, 8192)
    skewed = timed(attention.SKEWED, 0.5)
    skewed["seconds"]["mosaic"]["median"] = 1.11
    rows = [timed(long, 0.919, cudnn=0.5), timed(narrow, 0.87), timed(attention.EVEN, 0.5), skewed]
    rows += [timed(new, 0.5, cudnn=0.99), {"row": str(prefill(1, 16384)), "failed": "why"}]
    used = dataclasses.asdict(Hardware("test", 10**10, 1e9, {"bfloat16": 1e12}))
    figures = [figure.as_dict() for figure in attention.figures({"rows": rows, "roof": {"used": used}})]
    wanted = {f["what"]: (f["wanted"], pytest.approx(f["share"]), f["met"]) for f in figures if f["wanted"] is not None}
    assert wanted == {
        f"{long}, mosaic": (0.92, 0.919, False),
        f"{narrow}, mosaic": (0.87, 0.87, True),
        f"{new} beside cuDNN": (0.98, 0.99, True),
        f"{attention.SKEWED} beside even rows": (1 / 1.1, 1 / 1.11, False),
    }
