"""`ridgeline bench all`: all of it rehearsed; gates, limits, going on; and the benchmarks that it alone needs."""

import argparse
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attention_cases import dense
from ridgeline.benchmarks import attention, correctness, machine, profile, stages
from ridgeline.benchmarks.attention_rows import Row
from ridgeline.benchmarks.harness import Table
from ridgeline.benchmarks.worker import Worker
from ridgeline.cli import main
from ridgeline.pallas_kernels.pages import AttentionOptions


def test_a_rehearsal_runs_every_stage_and_goes_on_where_it_was(tmp_path):
    """On JAX 0.12 kernels are interpreted."""
    command = [sys.executable, "-m", "ridgeline", "bench", "all", "--rehearse", "--folder", tmp_path]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    run = subprocess.run(command, capture_output=True, text=True, timeout=550, env=environment)
    logs = "".join(path.read_text()[-1000:] for path in tmp_path.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    state = json.loads((tmp_path / "all.json").read_text())
    names = [stage.name for stage in stages.STAGES if stage.rehearsal is not None]
    assert {name: stage["status"] for name, stage in state["stages"].items()} == dict.fromkeys(names, "done")
    report = (tmp_path / "report.md").read_text()
    for name in names:
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert stored["rehearsal"]
        for figure in stored["figures"]:
            assert f"| {name}: {figure['what']} |" in report
    checked = json.loads((tmp_path / "correctness.json").read_text())
    assert checked["kernel"] == ("mosaic" if jax.__version_info__ >= (0, 12) else "reference")
    assert {row["op"] for row in checked["rows"]} == {"decode", "prefill", "matmul"}
    again = subprocess.run([*command, "--only", "machine,matmul"], capture_output=True, text=True, timeout=100)
    assert "machine: machine" in again.stdout
    assert "matmul" not in again.stdout


def test_ctrl_c_ends_the_processes_of_stages(tmp_path, monkeypatch):
    (program := tmp_path / "program").write_text("#!/bin/sh\nsleep 600")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    args = argparse.Namespace(minutes=60.0, command="ridgeline bench all", rehearse=True)
    everything = stages._All(args, tmp_path)
    with ThreadPoolExecutor(1) as pool:
        ended = pool.submit(everything.process, "decode", [], 600.0)
        while not everything.processes and not ended.done():
            time.sleep(0.01)
        everything.stop()
        assert ended.result(timeout=20) == "ended with -9: see decode.log"
    assert everything.reason_against(stages.STAGES[0]).startswith("not started")


@pytest.fixture
def run_all(tmp_path, monkeypatch):
    """Runs stages whose processes are stood in for; returns the exit code, what ran, and what became of each stage."""

    def run_all(*arguments, platform="gpu", device="card", wrong=(), checked=("decode", "prefill", "matmul")):
        ran = []

        def process(self, name, arguments, seconds):
            ran.append((name, " ".join(arguments), seconds))
            machine = {"platform": platform, "device": device, "hardware": {"devices": 8}}
            rows = [{"op": op} | ({"failed": "is wrong"} if op in wrong else {}) for op in checked]
            results = {"machine": machine, "correctness": {"rows": rows}}.get(name, {})
            (self.folder / f"{name}.json").write_text(json.dumps(results))
            return "done"

        monkeypatch.setattr(stages._All, "process", process)
        monkeypatch.setattr(stages, "write_report", lambda state, folder: None)
        code = main(["bench", "all", "--folder", str(tmp_path), *arguments])
        state = json.loads((tmp_path / "all.json").read_text())["stages"]
        return code, ran, {name: stage["status"] for name, stage in state.items()}

    return run_all


def test_stages_are_those_of_the_machine(run_all):
    code, ran, _ = run_all("--text", "books.txt")
    assert code == 0
    assert [name for name, *_ in ran] == [stage.name for stage in stages.STAGES if stage.gpu]
    assert ("quality", "quality --text books.txt", 900) in ran
    assert any(text.endswith("--tensor 1,8") for _, text, _ in ran)
    code, ran, _ = run_all("--only", "decode-1b,attention,replay", platform="cpu")
    assert [name for name, *_ in ran] == []  # of the machine no more is known than was
    code, ran, _ = run_all("--only", "machine,decode-1b,attention", platform="cpu")
    assert [(name, text) for name, text, _ in ran] == [
        ("machine", "machine --dtypes bfloat16,float32,int8,fp8"),
        ("decode-1b", "decode bundled"),
    ]


def test_what_runs_on_a_wrong_kernel_is_left_out_unless_it_is_asked_for(run_all):
    code, _, states = run_all(wrong=["matmul"])
    assert code == 0
    assert states["attention"] == states["loading"] == "done"
    assert states["matmul"] == states["decode-8b"] == "left out: the kernel of matmul is not shown to be right"
    _, _, states = run_all("--ungated", "--only", "matmul")
    assert states["matmul"] == "done"


def test_a_kernel_that_was_not_reached_is_not_right(run_all):
    _, _, states = run_all(checked=["decode", "matmul"])
    assert states["attention"] == "left out: the kernel of prefill is not shown to be right"
    assert states["matmul"] == "done"


def test_results_of_two_machines_are_not_mixed(run_all, capsys):
    run_all("--only", "machine")
    assert run_all("--only", "machine", device="another card")[0] == 2
    assert "holds results of card and this is another card; name another --folder" in capsys.readouterr().err


def test_no_stage_begins_when_the_minutes_are_over(run_all):
    code, ran, states = run_all("--minutes", "0")
    assert (code, ran) == (1, [])
    assert states["machine"] == "not started: the 0 minutes are over"


def test_a_stage_is_cut_off_at_its_limit_and_failures_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "store", lambda state, out: None)
    arguments = argparse.Namespace(minutes=1.0, rehearse=True, only=[], ungated=False, text=None, command="")
    everything = stages._All(arguments, tmp_path)
    started = time.monotonic()
    assert everything.process("slow", ["decode"], 1.0) == "cut off after 1 s"
    assert time.monotonic() - started < 20
    assert everything.process("bad", ["decode", "llama-9"], 60.0) == "ended with 2: see bad.log"
    assert "no preset" in (tmp_path / "bad.log").read_text()


def test_an_unknown_stage_is_refused(capsys, tmp_path):
    assert main(["bench", "all", "--only", "decoed", "--folder", str(tmp_path)]) == 2
    assert "there is no stage 'decoed'; there are machine, correctness" in capsys.readouterr().err


# --- processes ---


def test_a_worker_answers_and_says_how_it_ended():
    worker = Worker(functools.partial, eval, environment={"SAID": "5"})
    assert worker.ask("int(__import__('os').environ['SAID']) + 2") == 7
    assert "SAID" not in os.environ
    with pytest.raises(RuntimeError, match="no answer within 0 s"):
        worker.ask("__import__('time').sleep(1)", 0.1)
    with pytest.raises(RuntimeError, match="the process ended with 7"):
        Worker(functools.partial, eval).ask("__import__('os')._exit(7)")
    with pytest.raises(RuntimeError, match="TypeError: the first argument must be callable"):
        Worker(functools.partial, 3)
    worker.close()


# --- correctness ---

CASE = Row((40, 1, 0), shape=(1, 2, 64), S=16, window=20, sinks=True)


@pytest.fixture
def stand_in(monkeypatch):
    """Makes a function of queries and operands stand in for the kernel."""

    def stand_in(kernel):
        paged = attention.paged
        monkeypatch.setattr(attention, "paged", lambda row, name: kernel if name == "mosaic" else paged(row, name))
        monkeypatch.setattr(correctness, "kernel_here", lambda: "mosaic")

    return stand_in


def test_inputs_are_garbage_wherever_nothing_may_be_read():
    for case in (CASE, Row((40, 9), T=16, shape=(1, 2, 64), S=16, kv="fp8", op="prefill", soft_cap=3.0)):
        q, shared, [tables] = attention.make_inputs(case, 1, math.nan)
        starts = shared.pop("starts", jnp.asarray(case.lengths) - case.T)
        options = AttentionOptions(64**-0.5, case.window, case.soft_cap)
        rows = q if q.ndim == 5 else q[:, None]
        expected = dense(rows, **shared, **tables, starts=starts, options=options)  # reads what it may, in float64
        assert np.isfinite(expected).all()
        _, clean, [same] = attention.make_inputs(case, 1, 0.0)
        np.testing.assert_array_equal(tables["block_tables"], same["block_tables"])
        assert jnp.isnan(shared["pages"].k.astype(jnp.float32)).any()
        out = attention.paged(case, "reference")(q, clean | same).astype(jnp.float32)
        asked = np.arange(case.T) < np.asarray(case.lengths)[:, None]
        error = np.where(asked[..., None, None, None], np.asarray(out).reshape(expected.shape) - expected, 0)
        assert np.linalg.norm(error) < 2e-2 * np.linalg.norm(expected)


def test_a_kernel_that_reads_what_it_must_not_fails(stand_in):
    stand_in(attention.paged(CASE, "reference"))  # which reads all of a page
    assert "not finite" in correctness.check(CASE, 2)["failed"]


def test_a_wrong_and_a_restless_kernel_fail(stand_in):
    _, shared, [tables] = attention.make_inputs(CASE, 1, 0.0)
    reference, counter = attention.paged(CASE, "reference"), itertools.count()

    def restless(q, operands):
        drift = jax.pure_callback(lambda: np.float32(next(counter)), jax.ShapeDtypeStruct((), jnp.float32))
        return (reference(q, shared | tables) * (1.2 + drift)).astype(q.dtype)

    stand_in(restless)
    failed = correctness.check(CASE, 3)["failed"]
    assert "relative error 2" in failed
    assert "3 of 3 repeats gave other bits" in failed


def test_a_case_that_ends_its_process_fails_alone(monkeypatch):
    class Fragile:
        def __init__(self, make, environment):
            self.used = False

        def ask(self, number, seconds):
            assert not self.used, "after a failure comes a new process"
            if number == 1:
                self.used = True
                raise RuntimeError("the process ended with -11")
            return {"error": 0.0}

        def close(self):
            pass

    monkeypatch.setattr(correctness, "Worker", Fragile)
    results = {}
    correctness.supervise([0, 1, 2], math.inf, results)
    assert results == {0: {"error": 0.0}, 1: {"failed": "the process ended with -11"}, 2: {"error": 0.0}}


def test_every_case_of_a_gpu_is_listed_once():
    cases = correctness.cases(small=False)
    assert len(cases) == len(set(cases))
    assert {correctness.op_of(case) for case in cases} == {"decode", "prefill", "matmul"}


# --- profile, machine, tables ---


def test_a_profile_names_kernels_gaps_and_one_layer():
    events, at = [], 0
    for _, _ in itertools.product(range(profile.STEPS), range(2)):  # two layers a step
        for name, ns, gap in (("split", 3000, 500), ("matmul", 1000, 250)):
            events.append({"name": name, "at": at + gap, "ns": ns})
            at += gap + ns
    found = profile.summary(events, layers=2)
    assert found["kernels_a_step"] == 4
    assert found["busy_us"] == 8.0
    assert found["span_us"] == (at - 500) / 1e3 / profile.STEPS
    assert found["by_kernel_us"] == {"split": 6.0, "matmul": 2.0}
    assert found["layer"] == [
        {"name": "split", "at_us": 0.0, "us": 3.0, "gap_us": 0.5},
        {"name": "matmul", "at_us": 3.25, "us": 1.0, "gap_us": 0.25},
    ]


def test_the_machine_is_held_against_its_data_sheet():
    assert machine.data_sheet("NVIDIA H100 PCIe").name == "NVIDIA H100 PCIe"
    assert machine.data_sheet("NVIDIA H200").bandwidth == 4.8e12
    assert machine.data_sheet("cpu") is None
    report = {"device": "NVIDIA H200", "roof": {"bandwidth": 4.32e12, "peaks": {"bfloat16": 700e12}}}
    bandwidth, product = machine.figures(report)
    assert bandwidth.share == pytest.approx(0.9)
    assert product.share == pytest.approx(700 / 989.4)


def test_a_table_in_markdown():
    text = Table("title", ("name", "value"), [("a", "1")]).markdown()
    assert text == "**title**\n\n| name | value |\n| :-- | --: |\n| a | 1 |"
