"""The attention benchmark: what it counts, what it makes of timings, and that a wrong kernel fails it."""

import json
import math

import pytest

from ridgeline.benchmarks import attention
from ridgeline.benchmarks.attention_rows import decode, prefill
from ridgeline.cli import main


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

        def found(row):
            every = contenders(row)
            return every | {"mosaic": kernel_of(every["reference"])}

        monkeypatch.setattr(attention, "contenders", found)

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
    assert max(sum(row.lengths) * row.position_bytes for row in rows) < 12e9  # leaves room for peers' copies


def test_on_a_cpu_it_runs_and_says_what_that_proves(run):
    name = str(attention.TINY[3])  # the skewed one: lengths reach every contender
    code, report = run("--only", name)
    assert code == 0
    assert report["label"] == "cpu, tiny shapes: proves the program, not the kernel"
    (result,) = report["results"]
    found = result["implementations"]
    assert found["mosaic"]["reason"].startswith("not run: needs a Hopper GPU")
    assert found["cudnn"]["reason"].startswith("failed: ")
    assert result["errors"]["xla"] < attention.BOUND
    for name in ("reference", "xla"):
        assert 0 < found[name]["us_min"] <= found[name]["us"] <= found[name]["us_max"]
        assert len(found[name]["us_rounds"]) == 2
        assert found[name]["gb_per_s"] == pytest.approx(result["bytes"] / found[name]["us"] / 1e3, rel=1e-2, abs=1e-2)
        assert found[name]["of_limit"] == pytest.approx(
            found[name]["gb_per_s"] / report["ceilings"]["gb_per_s"], rel=1e-2, abs=1e-3
        )
    assert report["ceilings"]["gb_per_s"] == max(report["ceilings"][name]["gb_per_s"] for name in ("copy", "read"))


def test_a_right_kernel_is_timed(run, stand_in):
    stand_in(lambda reference: reference)
    code, report = run("--only", str(attention.TINY[-1]))
    assert code == 0
    (result,) = report["results"]
    assert result["errors"]["mosaic"] == 0.0
    found = result["implementations"]
    assert found["mosaic"]["over_kernel"] == 1.0
    assert found["reference"]["over_kernel"] == pytest.approx(
        found["reference"]["us"] / found["mosaic"]["us"], abs=1e-3
    )


def test_a_peer_that_computes_something_else_is_not_timed(run, monkeypatch):
    monkeypatch.setattr(attention, "over_dense", lambda row, name: lambda q, operands: q)
    code, report = run("--only", str(attention.TINY[0]))
    assert code == 0
    found = report["results"][0]["implementations"]
    assert found["xla"]["reason"].startswith("failed: its relative error is")
    assert "us" in found["reference"]


def test_a_row_that_cannot_be_made_fails_and_the_others_go_on(run, monkeypatch):
    make = attention.make_inputs

    def no_room(row, sets):
        if row == attention.TINY[1]:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return make(row, sets)

    monkeypatch.setattr(attention, "make_inputs", no_room)
    code, report = run("--only", "decode 2 x 256")
    assert code == 1
    assert [result.get("failed") for result in report["results"]] == [
        None,
        "failed: RuntimeError: RESOURCE_EXHAUSTED",
        None,
    ]


def test_a_program_that_memory_does_not_hold_is_not_run(run, monkeypatch):
    monkeypatch.setattr(attention, "MOST_BYTES", 1e6)
    code, report = run("--only", str(attention.TINY[0]))
    assert code == 0
    why = report["results"][0]["implementations"]["reference"]["reason"]
    assert why.startswith("failed: MemoryError: it would take")


@pytest.mark.parametrize("factor", [1.1, math.nan])
def test_a_wrong_kernel_is_not_timed_and_fails_the_run(run, stand_in, factor):
    stand_in(lambda reference: lambda q, operands: reference(q, operands) * factor)
    code, report = run("--only", str(attention.TINY[2]))
    assert code == 1
    (result,) = report["results"]
    assert "relative error" in result["failed"]
    assert not any("us" in found for found in result["implementations"].values())


def test_a_kernel_that_does_not_run_fails_the_run(run, stand_in):
    def refuses(reference):
        def kernel(q, operands):
            raise NotImplementedError("no such case")

        return kernel

    stand_in(refuses)
    code, report = run("--only", str(attention.TINY[2]))
    assert code == 1
    assert report["results"][0]["failed"] == "failed: NotImplementedError: no such case"


def test_rows_that_time_ran_out_for_are_named(run):
    code, report = run("--minutes", "0")
    assert code == 0
    assert [result["row"] for result in report["results"]] == [str(row) for row in attention.TINY]
    assert {result["not_run"] for result in report["results"]} == {"not run: out of time"}


def timed(row, us, of_limit=0.5, cudnn=None):
    peer = {"reason": "not run"} if cudnn is None else {"us": cudnn}
    return {"row": str(row), "implementations": {"mosaic": {"us": us, "of_limit": of_limit}, "cudnn": peer}}


def test_targets_are_met_or_not():
    long, narrow, new = decode(32, 32768), decode(32, 32768, kv="fp8"), prefill(1, 8192)
    results = [
        timed(long, 100, of_limit=0.919, cudnn=50),
        timed(narrow, 100, of_limit=0.87),
        timed(attention.EVEN, 100),
        timed(attention.SKEWED, 111),
        timed(new, 100, cudnn=99),
        {"row": str(prefill(1, 16384)), "failed": "why"},
    ]
    found = {target["row"]: (target["wanted"], target["found"], target["met"]) for target in attention.targets(results)}
    assert found == {
        str(long): (0.92, 0.919, False),
        str(narrow): (0.87, 0.87, True),
        str(new): (0.98, 0.99, True),
        str(attention.SKEWED): (1.10, 1.11, False),
    }
