"""`ridgeline bench decode`: what it counts, how it explains a gap, what it stores and refuses. No time is asserted."""

import json
import os
import statistics
import subprocess
import sys

import jax
import numpy as np
import pytest

from ridgeline.benchmarks.cells import Cell, decode_cell, explain_growth, prefill_cell, scaling
from ridgeline.benchmarks.decode_tables import show
from ridgeline.benchmarks.environment import Others
from ridgeline.benchmarks.limits import Figure, better, roof_record
from ridgeline.benchmarks.steps import chunks, plan_steps, rewind, running_rows
from ridgeline.benchmarks.subject import find_subject
from ridgeline.benchmarks.timing import in_turns, spread
from ridgeline.cli import main
from ridgeline.decode.sampling.layout import SamplingPlan
from ridgeline.model.presets import PRESETS, preset
from ridgeline.roofline import Deployment, Hardware, count_decode, count_prefill
from tiny import tiny_model

MACHINE = Hardware("test machine", 10**10, 1e10, {"float32": 1e11, "bfloat16": 2e11}, 1e9, 1e-6)
SHAPE = {"embed_dim": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "ffn_dim": 96, "vocab_size": 300}
TINY = ["llama-3.2-1b", "--layers", "2", *(word for pair in SHAPE.items() for word in ("--set", "{}={}".format(*pair)))]
SIZES = ["--batch", "1,2", "--context", "24,40", "--prompt", "5,33", "--tokens", "16", "--repeats", "2"]


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr("ridgeline.benchmarks.decode.measured_roof", lambda *args: MACHINE)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One run, as it is stored, and its picture."""
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ridgeline.benchmarks.decode.measured_roof", lambda *args: MACHINE)
        assert (
            main(["bench", "decode", *TINY, *SIZES, "--dtype", "float32", "--output", str(folder / "bench.json")]) == 0
        )
    return json.loads((folder / "bench.json").read_text())


def test_every_cell_is_stored_with_its_timings(results):
    sizes = [(cell["phase"], cell["batch"], cell["length"]) for cell in results["cells"]]
    decodes = [("decode", batch, length + 0.5) for batch in (1, 2) for length in (24, 40)]
    assert sizes == [("prefill", 1, 5), ("prefill", 1, 33), *decodes]
    for cell in results["cells"]:
        seconds = cell["seconds"]
        assert len(seconds["runs"]) == 2
        assert seconds["median"] == statistics.median(seconds["runs"])
        assert (seconds["min"], seconds["max"]) == (min(seconds["runs"]), max(seconds["runs"]))
    assert results["model"]["changes"] == SHAPE | {"num_layers": 2}
    assert results["model"]["dtype"] == "float32"
    assert results["command"].startswith("ridgeline bench decode llama-3.2-1b --layers 2 --set embed_dim=64 ")
    assert {"date", "hardware", "versions", "roofs"} <= results.keys()
    assert results["agreement"] is None
    assert not results["dry_run"]


def test_a_config_json_is_a_model_with_random_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["llama-3.2-1b"] | {"dtype": "float16"}))
    subject = find_subject(str(tmp_path / "config.json"), 3, [], "float32")
    assert subject.config == find_subject("llama-3.2-1b", 3, [], "float32").config
    assert subject.record["random_weights"]
    assert subject.title == f"{tmp_path.name} scaled"


def test_fractions_follow_from_counts_times_and_limits(results):
    hf = PRESETS["llama-3.2-1b"] | {"num_hidden_layers": 2}
    config = find_subject("llama-3.2-1b", 2, ["{}={}".format(*pair) for pair in SHAPE.items()], "float32").config
    deployment = Deployment(config, None, results["model"]["kv"])
    assert config.num_layers == hf["num_hidden_layers"]
    for cell in results["cells"]:
        seconds = cell["seconds"]["median"]
        if cell["phase"] == "prefill":
            counts, runs, tokens = [count_prefill(deployment, 1, cell["length"])], 1, cell["length"]
        else:
            contexts = range(round(cell["length"] - 7.5), round(cell["length"] + 8.5))
            counts, runs, tokens = [count_decode(deployment, cell["batch"], at) for at in contexts], 16, cell["batch"]
        flops, nbytes = sum(count.flops for count in counts) / runs, sum(count.bytes for count in counts) / runs
        assert (cell["flops"], cell["bytes"]) == (flops, nbytes)
        assert cell["mfu"] == pytest.approx(flops / seconds / 1e11)
        assert cell["mbu"] == pytest.approx(nbytes / seconds / 1e10)
        roof = sum(max(count.flops / 1e11, count.bytes / 1e10) for count in counts) / runs
        assert cell["predicted"] == pytest.approx(roof)
        assert cell["tokens_per_second"] == pytest.approx(tokens / seconds)


def test_what_is_attributed_sums_to_what_was_measured(results):
    for cell in results["cells"]:
        assert sum(cell["attributed"].values()) == pytest.approx(cell["seconds"]["median"])
        told = {name: seconds for name, seconds in cell["attributed"].items() if name != "unattributed"}
        assert min(told.values()) >= 0


@pytest.mark.parametrize(("context", "tokens"), [(128, 32), (512, 32), (40, 1), (40, 13), (129, 7)])
def test_steps_see_the_context_in_the_mean(context, tokens):
    steps = plan_steps(context, tokens)
    seen = [steps.cached + step + 1 for step in range(steps.count)]
    assert abs(statistics.fmean(seen) - context) <= 0.5
    assert steps.count >= tokens
    assert steps.count % steps.block == 0
    assert steps.capacity >= seen[-1]


def test_prompts_are_padded_as_generate_pads_them():
    assert [chunks(length) for length in (5, 33, 1024)] == [[(0, 16)], [(0, 64)], [(0, 1024)]]
    assert chunks(1025) == [(0, 1024), (1024, 16)]


def test_rows_that_are_timed_have_pages_of_their_own_and_as_many_as_a_window_reaches():
    runner, rows = running_rows(tiny_model(), 3, 200, None)  # a layer with a window of 9, and one without
    assert [len(row.pages.lists[1]) for row in rows] == [4] * 3
    for kind, count in enumerate((2, 4)):
        pages = [page for row in rows for page in dict.fromkeys(row.pages.lists[kind])]
        assert pages == list(range(3 * count))
    rewind(runner, np.array([5, 6, 7]), 130)
    made, places = runner.decode(rows, 2, SamplingPlan())
    assert (made[0].shape, places) == ((2, 3), [0, 1, 2])
    assert runner.state.lengths.tolist() == [132] * 3


def cell(batch=1, cached=99, tpot=0.02, queued=0.019, step=0.018, deployment=None, **peers) -> Cell:
    deployment = deployment or Deployment(preset("llama-3.2-1b"), None, "float32")
    timings = {"tpot": spread([tpot] * 3), "queued": spread([queued] * 3), "step": spread([step] * 3)}
    sizes = {"batch": batch, "cached": cached, "steps": 1}
    machine = Hardware("test", 10**10, 1e12, {"bfloat16": 1e15})
    return decode_cell(deployment, machine, timings, **sizes, peers=peers)


def test_differences_of_measurements_become_causes():
    found = cell().attributed
    counts = count_decode(Deployment(preset("llama-3.2-1b"), None, "float32"), 1, 100)
    assert found["weights"] == counts.weights.bytes / 1e12
    assert found["kv_read"] == counts.kv_read.bytes / 1e12
    assert found["host"] == pytest.approx(0.001)
    assert found["sampling"] == pytest.approx(0.001)
    rest = 0.02 - counts.bytes / 1e12 - 0.002
    assert found["unattributed"] == pytest.approx(rest)


def test_noise_below_zero_explains_nothing_and_no_cause_takes_more_than_there_is():
    found = cell(queued=0.021, step=0.022).attributed
    assert (found["host"], found["sampling"]) == (0, 0)
    found = cell(tpot=0.02, queued=0.001, step=0.0).attributed
    assert found["unattributed"] == pytest.approx(0)
    assert found["sampling"] == 0  # the host took all


def test_growth_with_context_and_rows_is_told_apart():
    def tpot(batch, context):  # beyond the roof: 1 ms, 3 us a position, 0.2 ms a row
        return cell(batch, context - 1, tpot=1.0).predicted + 1e-3 + 3e-6 * context + 2e-4 * batch

    sizes = [(batch, context) for batch in (1, 4, 8) for context in (100, 500)]
    found = explain_growth([cell(b, c - 1, tpot=tpot(b, c), queued=1.0, step=1.0) for b, c in sizes])
    for (batch, context), one in zip(sizes, found, strict=True):
        assert one.attributed["context"] == pytest.approx(3e-6 * context)
        assert one.attributed["rows"] == pytest.approx(2e-4 * batch)
        assert one.attributed["unattributed"] == pytest.approx(1e-3)
    alone = explain_growth([cell()])[0].attributed
    assert (alone["context"], alone["rows"]) == (0, 0)
    assert alone["unattributed"] == cell().attributed["unattributed"]


def test_a_prefill_s_padding_and_set_up_are_named():
    deployment = Deployment(preset("llama-3.2-1b"), None, "float32")
    machine = Hardware("test", 10**10, 1e12, {"bfloat16": 1e13})
    timings = {"ttft": spread([0.5, 0.5]), "set_up": spread([0.01])}
    sizes = {"batch": 1, "prompt": 600, "chunk": 1024, "padded": 1024}
    found = prefill_cell(deployment, machine, timings, **sizes)
    exact, padded = (count_prefill(deployment, 1, tokens).flops / 1e13 for tokens in (600, 1024))
    assert found.attributed["products"] + found.attributed["attention"] == pytest.approx(exact)
    assert found.attributed["padding"] == pytest.approx(padded - exact)
    assert found.attributed["set_up"] == 0.01
    assert sum(found.attributed.values()) == pytest.approx(0.5)


def test_the_roof_is_the_better_of_two_measurements():
    later = Hardware("later", 10**10, 2e10, {"float32": 5e10, "bfloat16": 3e11}, 2e9, 2e-6)
    roof = better(MACHINE, later)
    assert (roof.bandwidth, roof.peaks) == (2e10, {"float32": 1e11, "bfloat16": 3e11})
    assert (roof.link_bandwidth, roof.start_latency) == (2e9, 1e-6)
    record = roof_record(MACHINE, later, "float32")
    assert record["drift"] == {"bandwidth": 1.0, "peak": -0.5}
    assert record["used"]["bandwidth"] == 2e10


def test_scaling_and_ratios():
    two = Deployment(preset("llama-3.2-1b"), None, "float32", 2)
    linked = Hardware("test", 10**10, 1e12, {"bfloat16": 1e15}, 1e12)
    timings = dict.fromkeys(("tpot", "queued", "step"), spread([0.0125]))
    second = decode_cell(two, linked, timings, batch=1, cached=99, steps=1)
    rows = scaling([cell(), second])
    assert [row["tensor"] for row in rows] == [1, 2]
    assert [row["speedup"] for row in rows] == pytest.approx([1, 1.6])
    assert [row["efficiency"] for row in rows] == pytest.approx([1, 0.8])
    assert 1.5 < rows[1]["predicted"] < 2
    assert cell(peer=spread([0.03, 0.05])).ratios == {"peer": pytest.approx(2)}


def test_a_busy_machine_is_told(results):
    def notes(busy):
        return "".join(part for part in show(results | {"cores_busy_with_others": busy}) if isinstance(part, str))

    assert "BUSY MACHINE: other processes kept 1.50 of" in notes(1.5)
    assert "BUSY" not in notes(0.05)


@pytest.mark.skipif(not os.path.exists("/proc/stat"), reason="the system does not tell")
def test_the_work_of_other_processes_is_counted():
    watch = Others()
    spin = "import time; start = time.process_time()\nwhile time.process_time() < start + 1: pass"
    with subprocess.Popen([sys.executable, "-c", spin]) as other:  # not waited for yet: it is no child's time of ours
        while other.poll() is None:
            busy = watch.cores()
    assert busy > 0


def test_turns_alternate_and_a_contender_that_fails_is_out_with_its_reason():
    order = []

    def contender(name, fail=False):
        def turn():
            order.append(name)
            if fail and order.count(name) == 2:
                raise RuntimeError("out of luck\nsecond line")
            return {"all": float(len(order))}

        return turn

    turns = {"us": contender("us"), "a": contender("a"), "b": contender("b", fail=True)}
    timed, failures = in_turns(turns, 3)
    assert order == ["us", "a", "b", "a", "b", "us", "us", "a", "us", "a"]  # the first round is not counted
    assert failures == {"b": "RuntimeError: out of luck"}
    assert {name: each["all"].runs for name, each in timed.items()} == {"a": [4.0, 8.0, 10.0], "us": [6.0, 7.0, 9.0]}
    with pytest.raises(RuntimeError, match="out of luck"):
        in_turns({"us": contender("x", fail=True)}, 3, required={"us"})


def test_a_figure_is_a_share_of_its_limit():
    assert Figure("time", 20.0, 15.0, "ms", wanted=0.7).as_dict()["met"]
    assert Figure("time", 20.0, 15.0, "ms").share == 0.75
    rate = Figure("rate", 3.0, 4.0, "GB/s", 0.8, rate=True)
    assert (rate.share, rate.as_dict()["met"]) == (0.75, False)


def test_tables_fit_a_narrow_terminal_and_json_is_what_is_stored(capsys, monkeypatch, machine, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    out = tmp_path / "out.json"
    run = [
        "bench",
        "decode",
        *TINY,
        "--batch",
        "1",
        "--context",
        "24",
        "--prompt",
        "5",
        "--tokens",
        "8",
        "--repeats",
        "1",
    ]
    monkeypatch.chdir(tmp_path)
    assert main(run) == 0
    (file,) = tmp_path.iterdir()  # here, where nothing else is said
    assert file.name.startswith("decode-llama-3.2-1b-scaled-bfloat16-")
    tables, notes = capsys.readouterr().out.split("Roof of each device")
    assert "…" not in tables
    assert max(map(len, tables.splitlines())) <= 80
    assert "llama-3.2-1b scaled to 0.081 M parameters, bfloat16" in " ".join(tables.split())
    for heading in ("Prefill, measured", "Where the TTFT goes", "Decode, measured", "Where the TPOT goes"):
        assert heading in tables
    assert "20 FLOP/byte (200 GFLOP/s in bfloat16, 10 GB/s)" in notes
    assert main([*run, "--output", str(out), "--json"]) == 0
    stored = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == stored
    shares = [cell["predicted"] / cell["seconds"]["median"] for cell in stored["cells"]]
    assert [figure["share"] for figure in stored["figures"][:2]] == pytest.approx(shares)


def test_bundled_weights_and_a_plot(capsys, machine, tmp_path):
    pytest.importorskip("matplotlib")
    run = ["--batch", "1", "--context", "24", "--prompt", "5", "--tokens", "8", "--repeats", "1"]
    files = ["--output", str(tmp_path / "out.json"), "--plot", str(tmp_path / "bench.png")]
    assert main(["bench", "decode", "bundled", *run, *files]) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out.json").read_text())["model"]["random_weights"] is False


def test_tensor_degrees_on_forced_devices(tmp_path):
    code = f"""
import sys
from ridgeline.benchmarks import decode
from ridgeline.cli import main
from ridgeline.roofline import Hardware
machine = Hardware("test machine", 10**10, 1e10, {{"float32": 1e11}}, 1e9, 1e-6)
decode.measured_roof = lambda *args: machine
sys.exit(main({["bench", "decode", *TINY]} + sys.argv[1:]))
"""
    out = tmp_path / "out.json"
    sizes = ["--tensor", "1,2", "--batch", "1", "--context", "24", "--prompt", "5", "--tokens", "8", "--repeats", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    run = subprocess.run(
        [sys.executable, "-c", code, *sizes, "--dtype", "float32", "--output", str(out)],
        env=environment | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir},
        capture_output=True, text=True, timeout=180, cwd=tmp_path,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    assert "DRY RUN: the devices are forced on a CPU and share its cores" in run.stdout
    assert "Scaling over devices" in run.stdout
    report = json.loads(out.read_text())
    assert report["dry_run"]
    assert [row["tensor"] for row in report["scaling"]] == [1, 1, 2, 2]
    assert report["cells"][2]["attributed"]["collectives"] > 0 == report["cells"][0]["attributed"]["collectives"]
    assert report["scaling"][2]["efficiency"] == pytest.approx(report["scaling"][2]["speedup"] / 2)


def test_transformers_runs_beside_and_agrees(capsys, machine, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "out.json"
    sizes = ["--batch", "2", "--context", "24", "--prompt", "9", "--tokens", "8", "--repeats", "2"]
    run = [
        "bench",
        "decode",
        *TINY,
        "--layers",
        "1",
        *sizes,
        "--dtype",
        "float32",
        "--compare",
        "transformers",
        "--output",
        str(out),
    ]
    assert main(run) == 0
    report, printed = json.loads(out.read_text()), " ".join(capsys.readouterr().out.split())
    eager, compiled = "transformers eager", "transformers compiled"
    for found in report["cells"]:
        assert len(found["peers"][eager]["runs"]) == 2
        assert (compiled in found["peers"]) != (compiled in found["failures"])
    assert report["agreement"][eager]["equal"] == report["agreement"]["tokens"] == 32
    assert "times as fast as transformers eager (geometric mean)" in printed
    assert "Greedy tokens equal to those of transformers eager: 32 of 32 in float32" in printed


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["llama-3.2-1b", "--set", "embed_dims=64"], "there is no field 'embed_dims'; there are vocab_size, embed_dim"),
        (["llama-3.2-1b", "--set", "embed_dim"], "'embed_dim' is not FIELD=VALUE, such as embed_dim=768"),
        (["llama-3.2-1b", "--set", "embed_dim=6.5"], "embed_dim is a whole number, at least 1"),
        (["llama-3.2-1b", "--set", "num_heads=0"], "num_heads is a whole number, at least 1"),
        (["llama-3.2-1b", "--set", "tie_embeddings=1"], "tie_embeddings is true or false"),
        (
            ["llama-3.2-1b", "--set", "num_heads=7"],
            "with num_heads 7 is no model: config.json: num_heads 7 is not",
        ),
        (["llama-3.2-1b", "--layers", "0"], "--layers is 0; it must be at least 1"),
        (["bundled", "--layers", "2"], "'bundled' has weights of its own, whose shape is fixed; leave out num_layers"),
        (["bundled", "--batch", "1,0"], "--batch is 0; it must be at least 1"),
        (["bundled", "--context", "-5"], "--context is -5; it must be at least 1"),
        (["bundled", "--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["llama-2-7b", "--prompt", "4096"], "--prompt is 4096; llama-2-7b takes 4096 positions and one must be left"),
        (["llama-2-7b", "--context", "4090"], "--context 4090 with --tokens 32 ends at 4106 positions; llama-2-7b was"),
        (["bundled", "--compare", "transformers", "--tensor", "2"], "put 1 among them"),
        (["bundled", "--plot", "bench.gif"], "ends in '.gif'; end it in one of"),
        (["bundled", "--output", "no/where/out.json"], "is in no directory that exists; make it first"),
        (["llama-9"], "'llama-9' is no directory with a config.json and no preset"),
        (["llama-3.1-8b"], "it does not fit: weights of 16.06 GB and a cache of"),
    ],
)
def test_bad_arguments_are_one_line_without_a_traceback(capsys, machine, args, message):
    assert main(["bench", "decode", *args]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_too_few_devices_say_how_to_force_them(capsys, machine):
    wanted = 2 * jax.device_count()
    assert main(["bench", "decode", "llama-3.2-1b", "--tensor", str(wanted)]) == 2
    assert f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}" in capsys.readouterr().err


def test_compare_without_transformers_says_how_to_get_it(capsys, monkeypatch, machine):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["bench", "decode", "bundled", "--compare", "transformers"]) == 1
    assert "pip install 'ridgeline[parity]'" in capsys.readouterr().err
