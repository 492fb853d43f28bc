"""The benchmark of few-row products: what it counts, compares and wants, and that a wrong product fails it."""

import json

import pytest

from ridgeline.benchmarks import matmul
from ridgeline.cli import main


@pytest.fixture
def run(tmp_path):
    """Runs the command with arguments; returns its exit code and what it stored."""

    def run(*arguments):
        out = tmp_path / "matmul.json"
        code = main(["bench", "matmul", "--implementation", "reference", *arguments, "--output", str(out)])
        return code, json.loads(out.read_text())

    return run


def test_bytes_are_those_of_every_operand_and_the_result():
    bf16 = matmul.Row("w", 512, 256, 3, gated=True)
    assert bf16.bytes == 512 * 256 * 2 + 3 * 256 * 2 + 3 * 256 * 2
    int4 = matmul.Row("w", 512, 256, 1, "int4-32-zero", residual=True)
    assert int4.bytes == 512 * 256 // 2 + 512 * 8 * (4 + 1) + 256 * 2 + 512 * 2 + 512 * 2
    block = matmul.Row("w", 512, 256, 1, "fp8-block", gated=True)
    assert block.operands["scales"] == ((2, 2, 2), "float32")


def test_rows_are_each_listed_once():
    rows = [*matmul.full(), *matmul.TINY]
    assert len({str(row) for row in rows}) == len(rows)


def test_on_a_cpu_the_reference_runs_and_is_compared_with_bf16(run, monkeypatch):
    monkeypatch.setattr(matmul, "TINY", [matmul.TINY[0], matmul.TINY[-1]])
    code, report = run()
    assert code == 0
    assert report["label"] == matmul.CPU_LABEL
    assert [result["form"] for result in report["results"]] == ["bf16", "int4-32-zero"]
    for result in report["results"]:
        found = result["implementations"]["reference"]
        assert result["errors"]["reference"] == 0.0
        assert found["gb_per_s"] == pytest.approx(result["bytes"] / found["us"] / 1e3, rel=1e-2, abs=1e-2)
        assert result["over_bf16"] > 0
    first = report["results"][0]
    assert first["errors"]["xla"] < matmul.BOUND
    assert first["over_bf16"] == 1.0


def test_a_wrong_product_is_not_timed_and_fails_the_run(run, monkeypatch):
    monkeypatch.setattr(matmul, "xla", lambda row: lambda x, _: x[:, ::2] * float("nan"))
    code, report = run("--only", str(matmul.TINY[0]))
    assert code == 1
    assert "relative error" in report["results"][0]["failed"]


def test_targets_are_met_or_not():
    def result(form, rows, us, of_limit=0.5):
        found = {name: {"us": us, "of_limit": of_limit} for name in ("mosaic", "xla")}
        row = {"row": f"{form} {rows}", "weight": "8b gate_up", "form": form, "rows": rows}
        return row | {"implementations": found}

    results = [result("bf16", 1, 100, 0.91), result("int8", 1, 50), result("int4", 1, 40), result("int4", 64, 90)]
    matmul.compare(results, "mosaic")
    found = {target["row"]: (target["found"], target["met"]) for target in matmul.targets(results, "mosaic")}
    assert found == {"bf16 1": (0.91, True), "int8 1": (2.0, True), "int4 1": (2.5, False)}
