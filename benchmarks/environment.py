"""What every benchmark records beside its numbers: the machine, the versions, when; and where results lie."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LOAD_BEFORE = round(os.getloadavg()[0], 2)


def hardware() -> dict[str, Any]:
    """The processor, the cores that this process may use, memory, and the load before the benchmark began."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    memory = re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": model.group(1) if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(memory.group(1)) / 1e6, 1),
        "load_average_before": LOAD_BEFORE,  # above 0, others had their share of the cores
    }


def versions(*names: str) -> dict[str, str]:
    """Python's version, and that of each named distribution that is installed."""
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def command(program: str, arguments: list[str]) -> str:
    """The command line, with the names of files and no directories."""
    return " ".join([f"python benchmarks/{Path(program).name}", *(Path(argument).name for argument in arguments)])


def store(report: dict[str, Any], out: Path) -> None:
    """Writes JSON; whoever reads meanwhile, or after a run that was cut off, finds a whole report."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(out)
