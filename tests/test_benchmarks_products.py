"""The benchmark of single products: which are measured, and that the worst comes first."""

import json

import pytest

from ridgeline import PRESETS, preset
from ridgeline.benchmarks import products
from ridgeline.cli import main
from ridgeline.cli.common import USAGE


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the command on few bytes; returns its exit code and what it stored."""
    monkeypatch.setattr(products, "READ_BYTES", 1 << 18)

    def run(*arguments):
        out = tmp_path / "products.json"
        code = main(["bench", *arguments, "--repeats", "1", "--output", str(out)])
        return code, json.loads(out.read_text())

    return run


def test_every_product_of_a_layer_in_every_format_worst_first(run):
    code, report = run("products", "bundled", "--formats", "float32,int4-32", "--batch", "1,2")
    assert code == 0
    rows = report["rows"]
    assert {row["product"].split()[0] for row in rows} == {"qkv", "out", "gate_up", "down"}
    assert len(rows) == 4 * 2 * 2
    shares = [figure["share"] for figure in report["figures"]]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(min(row["rate"] / row["bandwidth"] for row in rows))
    sizes = {row["format"]: row["bytes"] for row in rows if row["product"].startswith("down")}
    assert sizes["int4-32"] / sizes["float32"] == pytest.approx(4.5 / 32)


def test_the_presets_are_measured_at_each_of_their_widths(run):
    _, report = run("products", "--formats", "int8")
    widths = {int(row["product"].split()[0]) for row in report["rows"]}
    assert widths == {width for name in PRESETS for width in (preset(name).embed_dim, preset(name).ffn_dim)}


def test_formats_shows_the_products_of_its_model(run):
    _, report = run("formats", "bundled", "--formats", "float32,bfloat16/int4+int8", "--batch", "1", "--tokens", "2")
    assert {row["format"] for row in report["products"]} == {"float32", "int4"}


def test_an_unknown_format_is_named(tmp_path, capsys):
    assert main(["bench", "products", "--formats", "int3"]) == USAGE
    assert "format 'int3' is none of float32" in capsys.readouterr().err
