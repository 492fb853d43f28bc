"""One decode step, kernel by kernel: how long each takes, and the gap before it.

The step runs as it is, with command buffers (CUDA graphs), and without them, where launches show.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..cli.common import add_format_options, usage_errors
from ..cli.formats import number
from ..decode.cache import init_cache
from . import subject as subjects
from .harness import Table
from .limits import Figure
from .steps import compiled_step, filled

STEPS = 4
LONGEST = 40  # kernels of a layer that are listed

Event = dict[str, Any]
"""A kernel's "name", when it started, "at", and how long it took, both in nanoseconds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser, default="llama-3.1-8b")
    add_format_options(parser)
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="rows (default: %(default)s)")
    parser.add_argument("--context", type=int, default=512, metavar="S", help="positions a row (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        schemes = args.dtype, args.quantize, args.quantize_output
        subject = subjects.find_subject(args.model, args.layers, args.set, *schemes)
    model, results = subjects.make_model(subject), {"subject": subject.title, "model": subject.record, "runs": {}}
    on_gpu = jax.default_backend() == "gpu"
    for name, kept in {"as it runs": True, **({"no command buffers": False} if on_gpu else {})}.items():
        options = {"xla_enable_command_buffers_during_profiling": kept} if on_gpu else {}
        cache = init_cache(model.config, args.batch, args.context + 3 * STEPS, kv_dtype=args.kv_dtype)
        cache = filled(cache, args.context)
        program, tokens = compiled_step(model, cache, options), jnp.zeros((args.batch,), jnp.int32)
        for _ in range(STEPS):
            logits, cache = program(model.params, tokens, cache)
        jax.block_until_ready(logits)
        with tempfile.TemporaryDirectory(prefix="ridgeline-profile-") as folder:
            with jax.profiler.trace(folder):
                for _ in range(STEPS):
                    logits, cache = program(model.params, tokens, cache)
                jax.block_until_ready(logits)
            events = device_events(Path(folder))
        results["runs"][name] = summary(events, subject.config.num_layers)
        yield results


def device_events(folder: Path) -> list[Event]:
    """What ran on a GPU's streams, or the operations of a CPU, in the order in which they started."""
    (path,) = folder.rglob("*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    gpus = [plane for plane in planes if "GPU" in plane.name]
    lines = [line for plane in gpus or planes for line in plane.lines if not gpus or "Stream" in line.name]
    ran = (e for line in lines for e in line.events if gpus or any(key == "hlo_op" for key, _ in e.stats))
    return sorted(({"name": e.name, "at": e.start_ns, "ns": e.duration_ns} for e in ran), key=lambda e: e["at"])


def summary(events: Sequence[Event], layers: int) -> dict[str, Any]:
    """Microseconds a step: from first to last, busy, and by kernel; and the kernels of one layer, one by one."""
    busy: Counter = Counter()
    for event in events:
        busy[event["name"]] += event["ns"] / 1e3 / STEPS
    span = max(event["at"] + event["ns"] for event in events) - events[0]["at"]
    return {
        "kernels_a_step": len(events) / STEPS,
        "span_us": span / 1e3 / STEPS,
        "busy_us": sum(busy.values()),
        "by_kernel_us": dict(busy.most_common(20)),
        "layer": one_layer(events, layers),
    }


def one_layer(events: Sequence[Event], layers: int) -> list[dict[str, Any]]:
    """The kernels from one of those that run once a layer to the next, past the middle; the first where none does."""
    counts = Counter(event["name"] for event in events)
    anchors = [name for name in counts if counts[name] == layers * STEPS]
    places = [i for i, event in enumerate(events) if anchors and event["name"] == anchors[0]]
    middle = len(places) // 2
    first, last = places[middle : middle + 2] if len(places) > middle + 1 else (0, len(events))
    rows = []
    for before, event in zip([None, *events][first:last], events[first : min(last, first + LONGEST)], strict=False):
        gap = 0 if before is None else event["at"] - before["at"] - before["ns"]
        at = event["at"] - events[first]["at"]
        rows.append({"name": event["name"], "at_us": at / 1e3, "us": event["ns"] / 1e3, "gap_us": gap / 1e3})
    return rows


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    for name, run in report["runs"].items():
        times = ("at_us", "us", "gap_us")
        rows = [(each["name"][:60], *(f"{each[key]:.2f}" for key in times)) for each in run["layer"]]
        yield Table(f"{report['subject']}, {name}: one layer", ("kernel", "at us", "us", "gap before"), rows)
        longest = ", ".join(f"{kernel[:40]} {number(us)}" for kernel, us in list(run["by_kernel_us"].items())[:5])
        busy = f"{run['kernels_a_step']:.0f} kernels a step, busy {number(run['busy_us'])} us"
        yield f"{busy} of {number(run['span_us'])}; the longest, us a step: {longest}."


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The time from first to last kernel beside what the kernels take: what is missing is gaps."""
    for name, run in report["runs"].items():
        yield Figure(f"a step, {name}", run["span_us"], run["busy_us"], "us")
