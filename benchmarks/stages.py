"""All that this machine can measure, cheapest truth first, in one report of every figure beside its limit.

Each stage is a benchmark in a process of its own, under a limit: one that hangs or crashes ends no other. The kernels
are checked first, and what runs on one that is not right is left out. Results, and the report, are stored after every
stage; the same command goes on where it was cut off.
"""

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..cli.common import FAILURE, OK, UsageError, terminal
from .environment import cores, store
from .report import write_report

GRACE = 45  # seconds that the last stage may take beyond the minutes
SHAPE = ["embed_dim=64", "num_heads=4", "num_kv_heads=2", "head_dim=16", "ffn_dim=96", "vocab_size=300"]
TINY = " ".join(["llama-3.2-1b --layers 1", *(f"--set {setting}" for setting in SHAPE)])
SHORT = "--batch 1 --context 24 --tokens 8 --repeats 1"
ONE, BITS = "--batch 1 --context 512 --prompt 512 --repeats 3", "--quantize int4 --quantize-output int8"
FORMATS = "--formats bfloat16,bfloat16/int8+int8,bfloat16/int4+int8,bfloat16/fp8+fp8 --repeats 3"
TWO = f"{SHORT} --formats float32,bfloat16/int4+int8"


@dataclasses.dataclass(frozen=True)
class Stage:
    """A benchmark with its arguments on a GPU, on a CPU, and in a rehearsal; None where it does not run.

    Attributes:
      name: of its file.
      seconds: that it may take.
      needs: kernels that have to be right.
    """

    name: str
    seconds: int
    needs: str
    gpu: str | None
    cpu: str | None
    rehearsal: str | None


ALL = "decode prefill matmul"
STAGES = (
    Stage("machine", 60, "", "machine --dtypes bfloat16,float32,int8,fp8", "machine", "machine"),
    Stage("correctness", 150, "", "correctness --minutes 2.2", "correctness", "correctness"),
    Stage("decode-1b", 90, ALL, f"decode llama-3.2-1b {ONE}", "decode bundled", f"decode {TINY} {SHORT} --prompt 5,33"),
    Stage("decode-8b", 150, ALL, f"decode llama-3.1-8b {ONE}", None, None),
    Stage("decode-8b-int4", 150, ALL, f"decode llama-3.1-8b {BITS} {ONE}", None, None),
    Stage("attention", 120, "decode prefill", "attention --quick --minutes 1.5", None, "attention --only 1k"),
    Stage("matmul", 90, "matmul", "matmul --quick --minutes 1", None, "matmul --only bf16"),
    Stage("prefill", 90, ALL, f"decode llama-3.1-8b --layers 8 {ONE} --prompt 2048,8192", None, None),
    Stage("profile", 90, ALL, "profile llama-3.1-8b --layers 4", "profile bundled", f"profile {TINY}"),
    Stage("transformers", 150, ALL, f"decode llama-3.2-1b {ONE} --compare transformers", None, None),
    Stage("tensor", 300, ALL, f"decode llama-3.1-8b {ONE} --tensor 1,{{devices}}", None, None),
    Stage("formats", 240, ALL, f"formats llama-3.1-8b {FORMATS}", "formats", f"formats {TINY} {TWO}"),
    Stage("products", 600, "", None, "products", f"products {TINY} --formats float32,int4 --repeats 1"),
    Stage(
        "replay",
        240,
        ALL,
        "replay",
        "replay --requests 40",
        f"replay {TINY} --requests 2 --scale-lengths 0.02 --max-batch 2 --prefill-tokens 64",
    ),
    Stage("loading", 300, "", "loading", "loading", "loading --gigabytes 0 --repeats 1 --only ridgeline"),
    Stage("quality", 900, ALL, "quality --text {text}", "quality --text {text}", None),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [stage.name for stage in STAGES]
    add = parser.add_argument
    add("--minutes", type=float, default=float("inf"), metavar="M", help="begin no stage later")
    add("--rehearse", action="store_true", help="every stage on small shapes, on a machine without a GPU")
    help = f"of {', '.join(names)} (default: all)"
    add("--only", type=lambda text: text.split(","), default=names, metavar="STAGE,...", help=help)
    add("--ungated", action="store_true", help="measure also what runs on a kernel that was not shown to be right")
    add("--text", metavar="FILE", help="for the stage quality: the books that the bundled models were trained on")
    add("--folder", type=Path, metavar="DIR", help="for results and report (default: all, here)")


def run(args: argparse.Namespace) -> int:
    """Runs what is not done yet; returns FAILURE if a stage was not."""
    unknown = [name for name in args.only if name not in [stage.name for stage in STAGES]]
    if unknown:
        raise UsageError(f"--only: there is no stage {unknown[0]!r}; there are {', '.join(s.name for s in STAGES)}")
    folder = args.folder or Path("rehearsal" if args.rehearse else "all")
    folder.mkdir(parents=True, exist_ok=True)
    everything = _All(args, folder)
    machine, correctness, *rest = STAGES
    everything.run(machine)
    device = everything.results("machine").get("device")
    known = everything.state["device"] = everything.state.get("device") or device
    store(everything.state, folder / "all.json")
    if known != device:
        raise UsageError(f"{folder} holds results of {known} and this is {device}; name another --folder")
    everything.run(correctness)
    pool = ThreadPoolExecutor(cores() if args.rehearse else 1)  # a rehearsal times nothing
    try:
        list(pool.map(everything.run, rest))
    finally:  # after Ctrl-C, which processes of their own do not hear
        pool.shutdown(wait=False, cancel_futures=True)
        everything.stop()
    undone = {name: stage["status"] for name, stage in everything.state["stages"].items() if stage["status"] != "done"}
    terminal().print(f"The report is {folder / 'report.md'}.", highlight=False, soft_wrap=True)
    return FAILURE if any(not status.startswith("left out") for status in undone.values()) else OK


class _All:
    """A run of all stages: what is done, and what follows."""

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.args, self.folder, self.began, self.lock = args, folder, time.monotonic(), threading.Lock()
        self.until = self.began + 60 * args.minutes
        self.processes: set[subprocess.Popen] = set()
        self.state: dict[str, Any] = {"stages": {}} | self.results("all") | {"command": args.command}

    def results(self, name: str) -> dict[str, Any]:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text()) if file.exists() else {}

    def run(self, stage: Stage) -> None:
        """Runs a stage, unless it is done or must not run; then writes state and report."""
        text, before = self.arguments(stage), self.state["stages"].get(stage.name, {})
        if text is None or stage.name not in self.args.only:
            return
        if (before.get("status"), before.get("arguments")) == ("done", text) and stage.name != "machine":
            return
        started, why = time.monotonic(), self.reason_against(stage)
        terminal().print(f"[{started - self.began:.0f} s] {stage.name}: {why or text}", markup=False, soft_wrap=True)
        status = why or self.process(stage.name, text.split(), min(stage.seconds, self.until + GRACE - started))
        if status != "done":
            terminal().print(f"{stage.name}: {status}", markup=False, soft_wrap=True)
        with self.lock:
            taken = {"arguments": text, "status": status, "seconds": round(time.monotonic() - started, 1)}
            self.state["stages"][stage.name] = taken
            store(self.state, self.folder / "all.json")
            write_report(self.state, self.folder)

    def stop(self) -> None:
        """End what runs, and begin nothing more."""
        self.until = self.began
        for process in list(self.processes):
            _kill(process)

    def arguments(self, stage: Stage) -> str | None:
        """The stage's command line on this machine; None where it does not run."""
        machine = self.results("machine")
        on_gpu = machine.get("platform") == "gpu" or stage.name == "machine"
        text = stage.rehearsal if self.args.rehearse else stage.gpu if on_gpu else stage.cpu
        devices = machine["hardware"]["devices"] if on_gpu and machine else 1
        absent = {"{text}": self.args.text is None, "{devices}": devices == 1}
        if text is None or any(name in text and absent[name] for name in absent):
            return None
        return text.replace("{text}", str(self.args.text)).replace("{devices}", str(devices))

    def reason_against(self, stage: Stage) -> str | None:
        if time.monotonic() > self.until:
            return f"not started: the {self.args.minutes:g} minutes are over"
        rows, needs = self.results("correctness").get("rows", []), set(stage.needs.split())
        right = {row["op"] for row in rows} - {row["op"] for row in rows if "failed" in row}
        if needs <= right or self.args.ungated:
            return None
        return f"left out: the kernel of {' and '.join(sorted(needs - right))} is not shown to be right"

    def process(self, name: str, arguments: Sequence[str], seconds: float) -> str:
        """Runs a command of `ridgeline bench` in a process of its own; what became of it."""
        out = self.folder / f"{name}.json"
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        if self.args.rehearse:
            environment |= {"JAX_PLATFORMS": "cpu", "RIDGELINE_REHEARSE": "1"}
        elif self.results("machine").get("platform") == "gpu":  # all stages run the products that one has chosen
            (tuned := self.folder / "autotune").mkdir(exist_ok=True)
            flags = os.environ.get("XLA_FLAGS", "")
            environment["XLA_FLAGS"] = f"{flags} --xla_gpu_per_fusion_autotune_cache_dir={tuned}".strip()
        command = [sys.executable, "-m", "ridgeline", "bench", *arguments, "--output", str(out)]
        with (self.folder / f"{name}.log").open("w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
            self.processes.add(process)
            try:
                code = process.wait(max(1.0, seconds))
            except subprocess.TimeoutExpired:
                return f"cut off after {seconds:.0f} s"
            finally:
                self.processes.discard(process)
                _kill(process)
        if code == 0:
            return "done"
        return "failed: see what it says" if code == FAILURE and out.exists() else f"ended with {code}: see {name}.log"


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # and what it started
