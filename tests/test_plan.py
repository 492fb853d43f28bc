"""`ridgeline plan`: what it prints, refuses and draws."""

import json
import shutil
import sys

import pytest

from ridgeline.cli import main
from ridgeline.model.loading import convert_model
from ridgeline.model.presets import PRESETS, preset
from ridgeline.roofline import HARDWARE, Deployment, Hardware, plan, predict_decode


def plan_json(capsys, *args):
    assert main(["plan", *map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json_is_the_library_s_own_figures(capsys):
    sizes = ("--tensor", "1,2", "--batch", "1,128", "--context", 4096, "--prompt", 3000)
    formats = ("--weights", "int8", "--kv", "fp8")
    report = plan_json(capsys, "llama-3.1-8b", *sizes, *formats, "--hardware", "h200", "--price", 3)
    config = preset("llama-3.1-8b").replace(dtype="bfloat16")
    rows = plan(
        config,
        HARDWARE["h200"],
        tensors=[1, 2],
        batches=[1, 128],
        context=4096,
        prompt=3000,
        chunk=1024,
        weights="int8",
        kv="fp8",
        price=3,
    )
    for found, row in zip(report["rows"], rows, strict=True):
        names = (
            "tensor",
            "batch",
            "fits",
            "weight_bytes",
            "kv_bytes",
            "free_bytes",
            "largest_batch",
            "longest_context",
        )
        for name in (*names, "ttft", "tpot", "tokens_per_second", "cost_input", "cost_output"):
            assert found[name] == getattr(row, name), name
        for phase in ("prefill", "decode"):
            assert found[phase]["bound"] == getattr(row, phase).bound
            assert found[phase]["counts"]["weights"]["bytes"] == getattr(row, phase).counts.weights.bytes
    assert report["hardware"]["memory"] == HARDWARE["h200"].memory
    assert (report["dtype"], report["kv"], report["weights"]) == ("bfloat16", "fp8", "int8")
    assert report["kv_bytes_per_token"] == 32 * 2 * 8 * (128 + 4)
    assert report["ridge"] == HARDWARE["h200"].ridge("bfloat16")


def test_speculation_beside_plain_decoding(capsys):
    sizes = ("llama-3.1-8b", "--batch", "1,64", "--context", 4096, "--hardware", "h200")
    without = plan_json(capsys, *sizes)["rows"]
    assert [row["speculation"] for row in without] == [None, None]
    free, drafted = (
        plan_json(capsys, *sizes, "--acceptance", 0.7, *draft)["rows"] for draft in ((), ("--draft", "llama-3.2-1b"))
    )
    draft = Deployment(preset("llama-3.2-1b").replace(dtype="bfloat16"))
    for plain, cheap, row in zip(without, free, drafted, strict=True):
        assert row["weight_bytes"] == plain["weight_bytes"] + draft.parameter_bytes
        assert row["kv_bytes"] == plain["kv_bytes"] + draft.cache_bytes(row["batch"], 4096)
        assert row["largest_batch"] < plain["largest_batch"]
        best = row["speculation"]
        assert best["speedup"] == pytest.approx(best["plain_seconds"] / best["tpot"])
        assert best["tpot"] == pytest.approx((best["draft_seconds"] + best["verify"]["seconds"]) / best["tokens"])
        assert cheap["speculation"]["draft_seconds"] == 0
        assert cheap["speculation"]["speedup"] > best["speedup"]
    assert drafted[0]["speculation"]["speedup"] > 1.4
    assert main(["plan", "llama-3.1-8b", "--acceptance", "0.7"]) == 0
    assert "Speculation by drafts that cost nothing" in capsys.readouterr().out
    assert main(["plan", "llama-3.1-8b", "--draft", "llama-3.2-1b"]) == 2
    assert "acceptance" in capsys.readouterr().err


def test_what_does_not_fit_says_what_would(capsys):
    rows = plan_json(capsys, "llama-3.1-70b", "--batch", "1", "--tensor", "1,2")["rows"]
    assert [row["fits"] for row in rows] == [False, True]
    assert rows[0]["remedies"] == ["tensor 2", "weights int8"]
    assert rows[0]["ttft"] is rows[0]["decode"] is None
    assert rows[1]["remedies"] == []


def test_tables_have_every_row_and_fit_a_narrow_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    args = ["plan", "llama-3.1-8b", "--tensor", "1,8", "--batch", "1,128", "--price", "2.5", "--context", "8192"]
    assert main(args) == 0
    out = capsys.readouterr().out
    tables, notes = out.split("A device has")
    title = "llama-3.1-8b on NVIDIA H100 SXM: weights bfloat16, KV bfloat16, context 8,192"
    assert tables.splitlines()[0] == title  # across the terminal, however narrow its table is
    assert "…" not in tables  # nothing is cut short
    assert max(len(line) for line in tables.splitlines()) <= 80
    for heading in ("Memory of each device, GB", "Prefill, at best", "Decode, at best", "USD a million tokens"):
        assert heading in tables
    words = " ".join(tables.split())
    assert "no, but with batch 56 or context 3,584 or tensor 4" in words
    step = predict_decode(Deployment(preset("llama-3.1-8b")), HARDWARE["h100"], batch=1, context=8192)
    line = next(line for line in tables[tables.index("Decode") :].splitlines() if line.split()[:2] == ["1", "1"])
    assert f"{step.seconds * 1e3:.2f} ms" in line
    assert line.split()[-5:] == ["memory", f"{step.mfu:.1%}", "100%", "0.0%", f"{step.intensity:.2f}"]
    assert "Ridge: 295 FLOP/byte (989 TFLOP/s in bfloat16, 3.35 TB/s)" in notes
    assert "128 KiB" in notes
    assert f"{step.mfu:.2%} of the peak" in notes
    assert "2 TFLOP/s, 0.64%" in notes  # the correction stands where utilization is shown


def test_nothing_fits_prints_memory_alone(capsys):
    assert main(["plan", "llama-3.1-405b", "--batch", "1"]) == 0
    out = capsys.readouterr().out
    assert "no, but with" in out
    assert "Decode" not in out


def test_efficiency_is_named(capsys):
    assert main(["plan", "llama-3.2-1b", "--batch", "1", "--efficiency", "0.7"]) == 0
    assert "70% of their limits" in capsys.readouterr().out


def test_directories_and_bundled_models(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["llama-3.2-1b"]))
    args = ("--batch", "1", "--context", "256")
    for model in (tmp_path, tmp_path / "config.json"):
        assert plan_json(capsys, model, *args)["rows"] == plan_json(capsys, "llama-3.2-1b", *args)["rows"]
    converted = convert_model("bundled", tmp_path / "converted")
    assert plan_json(capsys, converted, *args)["rows"] == plan_json(capsys, "bundled", *args)["rows"]


def test_half_a_conversion_is_refused(capsys, tmp_path):
    converted = convert_model("bundled", tmp_path / "converted")
    shutil.move(converted, tmp_path / "converted.incomplete")
    assert main(["plan", str(tmp_path / "converted.incomplete")]) == 2
    assert "was cut short" in capsys.readouterr().err


def test_here_is_measured(capsys, monkeypatch):
    machine = Hardware("this machine (test)", 10**10, 1e10, {"float32": 1e11, "bfloat16": 2e11})
    monkeypatch.setattr("ridgeline.cli.plan.measure", lambda progress: progress("memory bandwidth") or machine)
    report = plan_json(capsys, "bundled", "--hardware", "here", "--batch", "1")
    assert report["hardware"]["name"] == "this machine (test)"
    assert report["kv"] == "float32"  # as the cache is on a CPU
    assert main(["plan", "bundled", "--hardware", "here", "--tensor", "2"]) == 2
    assert "has no link to other devices" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_plot(capsys, tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"plan.{suffix}"
    assert main(["plan", "llama-3.1-8b", "--tensor", "1,2", "--batch", "1,8,500", "--plot", str(file)]) == 0
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert file.name in "".join(capsys.readouterr().out.split())


def test_a_plot_of_nothing_is_refused(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    assert main(["plan", "llama-3.1-405b", "--batch", "1", "--plot", str(tmp_path / "plan.png")]) == 2
    assert "nothing fits; take more devices" in capsys.readouterr().err


def test_a_plot_without_matplotlib_fails_with_the_remedy(capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["plan", "llama-3.1-8b", "--plot", str(tmp_path / "plan.png")]) == 1
    assert "pip install 'ridgeline[notebooks]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["llama-9"],
            "'llama-9' is no directory with a config.json and no preset; presets: gemma-2-27b,",
        ),
        (["llama-3.1-8b", "--hardware", "h900"], "h900"),
        (["llama-3.1-8b", "--tensor", "0"], "tensors are [0]; give at least one, each at least 1"),
        (["llama-3.1-8b", "--tensor", "1,x"], "argument --tensor: '1,x' is not whole numbers with commas between"),
        (["llama-3.1-8b", "--tensor", "3"], "size 14336 does not divide over the 3 devices"),
        (["llama-3.1-8b", "--tensor", "12"], "num_kv_heads 8 with 4 query heads each cannot be shared"),
        (["llama-3.1-8b", "--batch", "1,-2"], "batches are [1, -2]; give at least one, each at least 1"),
        (["llama-3.1-8b", "--context", "0"], "context is 0; it must be between 1 and 131072"),
        (["llama-2-7b", "--context", "5000"], "context is 5000; it must be between 1 and 4096"),
        (["llama-3.1-8b", "--prompt", "9000"], "prompt is 9000; it must be between 1 and the context, 8192"),
        (["llama-3.1-8b", "--weights", "int3"], "int3"),
        (["llama-3.1-8b", "--kv", "int4"], "int4"),
        (["llama-3.1-8b", "--price", "-1"], "price is -1.0; it must be positive"),
        (["llama-3.1-8b", "--price", "nan"], "price is nan; it must be positive"),
        (["llama-3.1-8b", "--memory-fraction", "1.1"], "memory_fraction is 1.1; it must be above 0 and at most 1"),
        (["llama-3.1-8b", "--efficiency", "0"], "efficiency is 0.0; it must be above 0 and at most 1"),
        (["llama-3.1-8b", "--plot", "plan.gif"], "plan.gif' ends in '.gif'; end it in one of .png, .pdf, .svg"),
        (["llama-3.1-8b", "--plot", "no/where/plan.png"], "is in no directory that exists; make"),
    ],
)
def test_bad_arguments_are_one_line_without_a_traceback(capsys, args, message):
    assert main(["plan", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_the_default_context_is_what_the_model_can_hold(capsys):
    report = plan_json(capsys, "llama-2-7b", "--batch", "1")
    assert (report["context"], report["prompt"]) == (4096, 2048)
