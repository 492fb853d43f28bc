"""The benchmark of few-row products: what it counts, compares and wants."""

import dataclasses
import json

import pytest

from ridgeline.benchmarks import matmul
from ridgeline.benchmarks.kernel_rows import BOUND
from ridgeline.cli import main
from ridgeline.roofline import Hardware


@pytest.fixture
def run(tmp_path):
    """Runs the command with arguments; returns its exit code and what it stored."""

    def run(*arguments):
        out = tmp_path / "matmul.json"
        code = main(["bench", "matmul", *arguments, "--output", str(out)])
        return code, json.loads(out.read_text())

    return run


def test_bytes_are_those_of_every_operand_and_the_result():
    bf16 = matmul.Row("w", 512, 256, 3, gated=True)
    assert bf16.bytes == 512 * 256 * 2 + 3 * 256 * 2 + 3 * 256 * 2
    int4 = matmul.Row("w", 512, 256, 1, "int4-32-zero", residual=True)
    assert int4.bytes == 512 * 256 // 2 + 512 * 8 * (4 + 1) + 256 * 2 + 512 * 2 + 512 * 2
    block = matmul.Row("w", 512, 256, 1, "fp8-block", gated=True)
    assert block.operands["scales"] == ((2, 2, 2), "float32")
    experts = matmul.Row("w", 512, 256, 6, "int8", experts=8, top_k=3)
    hit = sum(experts.sizes > 0)
    assert experts.sizes.sum() == 6
    assert 3 <= hit <= 6
    assert experts.bytes == hit * (512 * 256 + 512 * 4) + 6 * 256 * 2 + 6 * 512 * 2


def test_rows_are_each_listed_once():
    rows = [*matmul.full(), *matmul.TINY]
    assert len({str(row) for row in rows}) == len(rows)


def test_on_a_cpu_the_reference_runs_and_is_compared_with_bf16(run, monkeypatch):
    monkeypatch.setattr(matmul, "TINY", [matmul.TINY[0], matmul.TINY[-2]])
    code, report = run()
    assert code == 0
    bf16, int4 = report["rows"]
    assert [bf16["form"], int4["form"]] == ["bf16", "int4-32-zero"]
    assert bf16["errors"]["xla"] < BOUND
    shares = {figure["what"]: figure["share"] for figure in report["figures"]}
    speed = bf16["seconds"]["reference"]["median"] / int4["seconds"]["reference"]["median"]
    assert shares[f"{int4['row']} beside bf16"] == pytest.approx(speed)
    limit = max(
        bf16["bytes"] / report["roof"]["used"]["bandwidth"], bf16["flops"] / report["roof"]["used"]["peaks"]["bfloat16"]
    )
    assert shares[f"{bf16['row']}, reference"] == pytest.approx(limit / bf16["seconds"]["reference"]["median"])


def test_targets_are_met_or_not():
    def row(form, rows, seconds, nbytes=0):
        timings = {name: {"median": seconds} for name in ("mosaic", "xla")}
        sizes = {"bytes": nbytes, "flops": 0, "weight": "8b gate_up", "form": form, "M": rows}
        return {"row": f"{form} {rows}", "seconds": timings, **sizes}

    rows = [row("bf16", 1, 1.0, 0.91e9), row("int8", 1, 0.5), row("int4", 1, 0.4), row("int4", 64, 0.9)]
    used = dataclasses.asdict(Hardware("test", 10**10, 1e9, {"bfloat16": 1e12}))
    figures = [figure.as_dict() for figure in matmul.figures({"rows": rows, "roof": {"used": used}})]
    assert {f["what"]: (pytest.approx(f["share"]), f["met"]) for f in figures if f["wanted"] is not None} == {
        "bf16 1, mosaic": (0.91, True),
        "int8 1 beside bf16": (2.0, True),
        "int4 1 beside bf16": (2.5, False),
    }
