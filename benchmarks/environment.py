"""What every benchmark records beside its numbers: the machine, the versions, when; and how results are stored."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..cli.formats import to_json

_DISTRIBUTIONS = (
    *("ridgeline", "jax", "jaxlib", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "nvidia-cuda-nvcc", "numpy"),
    *("safetensors", "orbax-checkpoint", "torch", "transformers"),
)

_CARD = "name,driver_version,memory.total,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"


def record(benchmark: str, command: str) -> dict[str, Any]:
    """The benchmark, its command line, the date and time in UTC, the machine, the
    commit, XLA's flags, and the versions of what is installed.
    """
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    model = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    memory = re.search(r"MemTotal:\s+(\d+)", _read("/proc/meminfo"))
    return {
        "benchmark": benchmark,
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "flags": os.environ.get("XLA_FLAGS", ""),
        "device": jax.devices()[0].device_kind,
        "hardware": {
            "devices": jax.device_count(),
            "cpu": model.group(1) if model else platform.machine(),
            "cores": cores(),
            "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
            "card": card(),
        },
        "versions": versions,
    }


def _commit() -> str | None:
    """Of the checkout that runs, marked where files differ from it; None of an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def card() -> dict[str, str]:
    """What the driver says of the first GPU, clocks included; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={_CARD}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CARD.split(","), (field.strip() for field in lines[0].split(",")), strict=False))


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Others:
    """How many cores other processes keep busy, from when this is made. Where the system does not tell, None."""

    def __init__(self):
        self._started, self._busy = time.monotonic(), _busy_seconds_of_others()

    def cores(self) -> float | None:
        """In the mean until now."""
        busy = _busy_seconds_of_others()
        if busy is None or self._busy is None:
            return None
        return round(max(0.0, busy - self._busy) / (time.monotonic() - self._started), 2)


def _busy_seconds_of_others() -> float | None:
    fields = _read("/proc/stat").partition("\n")[0].split()[1:]
    if not fields:
        return None
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    own = os.times()
    total = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    return total - (own.user + own.system + own.children_user + own.children_system)


def _read(path: str) -> str:
    """A file that Linux has and other systems lack."""
    return Path(path).read_text() if Path(path).exists() else ""


def command(arguments: Sequence[str]) -> str:
    """A command line of `ridgeline`, with the names of files and no directories."""
    names = (Path(text).name if os.sep in text and Path(text).parent.is_dir() else text for text in arguments)
    return " ".join(["ridgeline", *names])


def slug(text: str) -> str:
    """A part of a file's name: "NVIDIA H200" is "h200"."""
    return re.sub(r"[^a-z0-9.+]+", "-", text.lower().removeprefix("nvidia ")).strip("-")


def store(report: dict[str, Any], out: Path) -> None:
    """Writes JSON; whoever reads meanwhile, or after a run that was cut off, finds a whole report."""
    partial = out.with_name(out.name + ".partial")
    try:
        partial.write_text(to_json(report, indent=1) + "\n")
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
