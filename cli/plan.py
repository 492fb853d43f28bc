"""`ridgeline plan`: what a model will do on a machine, before there is either."""

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

from ..decode.buckets import PREFILL_CHUNK
from ..model.find import find_config
from ..model.presets import PRESETS
from ..model.schemes import SCHEMES
from ..roofline.deployment import KV_FORMATS, WEIGHT_FORMATS, Deployment
from ..roofline.hardware import HARDWARE, Hardware, find_hardware
from ..roofline.measure import measure
from ..roofline.plan import PlanRow, check_plan, plan, remedies
from ..roofline.plot import check_plot, plot_plan
from ..roofline.predict import Phase
from .common import OK, print_notes, terminal, usage_errors
from .formats import duration, integers, number, percent, print_json, simple_table

HERE = "here"
_BOUNDS = {"compute": "compute", "bandwidth": "memory", "communication": "links"}


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "plan",
        help="predict memory, latency, throughput and cost of a model on given hardware",
        description="Work out from the model's shapes and the hardware's limits what fits, how fast it can be at best "
        "and what bounds it, for every combination of tensor degree and batch. Nothing is loaded or compiled.",
        epilog=f"presets: {', '.join(PRESETS)}",
    )
    add = parser.add_argument
    help = "a preset, its name on the Hub, a config.json, a directory that has one, or 'bundled'"
    add("model", metavar="MODEL", help=help)
    help = f"one of {', '.join(HARDWARE)} (default: %(default)s), or '{HERE}' to measure this machine"
    add("--hardware", choices=(*HARDWARE, HERE), default="h100", metavar="NAME", help=help)
    add("--tensor", type=integers, default=[1], metavar="N,...", help="devices that share every layer (default: 1)")
    help = "groups of devices that share out the experts of a layer (default: %(default)s)"
    add("--expert", type=int, default=1, metavar="N", help=help)
    add("--batch", type=integers, default=[1, 8, 32], metavar="B,...", help="rows (default: 1,8,32)")
    add("--context", type=int, metavar="S", help="positions a row holds (default: 8192, or the model's longest)")
    add("--prompt", type=int, metavar="T", help="of them, prompt tokens (default: half)")
    help = f"{', '.join(WEIGHT_FORMATS)}; int4 has groups of 128, int4-32 of 32 (default: bfloat16, or as published)"
    add("--weights", choices=WEIGHT_FORMATS, metavar="FORMAT", help=help)
    help = f"of the cache: {', '.join(KV_FORMATS)} (default: unquantized)"
    add("--kv", choices=KV_FORMATS, metavar="FORMAT", help=help)
    help = "of a drafted token, 0 to 1: adds speculative decoding, with drafts that cost nothing or those of --draft"
    add("--acceptance", type=float, metavar="A", help=help)
    add("--draft", metavar="MODEL", help="a model that drafts, in the same formats on the same devices, as MODEL")
    add("--price", type=float, metavar="USD", help="of one device for an hour, to work out the price of a token")
    help = "of a device's memory, for weights and cache (default: %(default)s)"
    add("--memory-fraction", type=float, default=0.9, metavar="F", help=help)
    help = "fraction of each limit that is reached (default: 1)"
    add("--efficiency", type=float, default=1.0, metavar="F", help=help)
    add("--plot", type=Path, metavar="FILE", help="draw the roofline, TPOT and throughput to a .png, .pdf or .svg")
    add("--json", action="store_true", help="print one JSON object instead of tables")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        # A weight format leaves activations as they are, and a checkpoint's float32 is not how it is run.
        config = find_config(args.model).replace(dtype="bfloat16")
        context = min(8192, config.max_position) if args.context is None else args.context
        prompt = max(1, context // 2) if args.prompt is None else args.prompt
        weights = args.weights or ("bfloat16" if config.quantization is None else None)
        settings = {"context": context, "weights": weights, "kv": args.kv, "memory_fraction": args.memory_fraction}
        limits = {"efficiency": args.efficiency, "price": args.price}
        draft = None if args.draft is None else find_config(args.draft).replace(dtype="bfloat16")
        drafts = {"acceptance": args.acceptance, "draft": draft}
        sizes = {"tensors": args.tensor, "batches": args.batch, "expert": args.expert, "prompt": prompt}
        check_plan(config, **sizes, **limits, **settings, **drafts)
        if args.plot is not None:
            check_plot(args.plot)
    hardware = _hardware(args.hardware)
    if args.hardware == HERE and jax.default_backend() == "cpu":
        settings["kv"] = args.kv or "float32"  # as `init_cache` has it on a CPU
    with usage_errors():
        rows = plan(config, hardware, chunk=PREFILL_CHUNK, **sizes, **limits, **settings, **drafts)
        deployment = Deployment(config, weights, settings["kv"])
        dtype = deployment.config.dtype
        kv = settings["kv"] or dtype
        stored = weights or next(name for name, scheme in SCHEMES.items() if scheme == config.quantization.layers)
        title = f"{args.model} on {hardware.name}: weights {stored}, KV {kv}, context {context:,}"
        title += f", expert {args.expert}" if args.expert > 1 else ""
        if args.plot is not None:
            plot_plan(args.plot, title, hardware, dtype, rows)
    helps = [[] if row.fits else remedies(config, hardware, row, **settings) for row in rows]
    if args.json:
        report = {"model": args.model, "hardware": dataclasses.asdict(hardware), "dtype": dtype, "prompt": prompt}
        report |= {"ridge": hardware.ridge(dtype), "kv_bytes_per_token": deployment.kv_bytes_per_token}
        report |= settings | {"kv": kv, "weights": stored, "expert": args.expert} | limits
        report |= {"acceptance": args.acceptance, "draft": args.draft}
        print_json(report | {"rows": list(map(_report, rows, helps))})
        return OK
    console, fitting = terminal(), [row for row in rows if row.fits]
    console.print(f"{title}\n", highlight=False, markup=False, style="italic")
    console.print(_memory_table(rows, helps))
    if fitting:
        console.print(_phase_table("prefill", fitting), _phase_table("decode", fitting), sep="\n")
    if fitting and args.acceptance is not None:
        console.print(_speculation_table(args, fitting))
    if fitting and args.price is not None:
        table = simple_table("USD a million tokens", "tensor", "batch", "of prompts", "new")
        for row in fitting:
            table.add_row(str(row.tensor), str(row.batch), f"{row.cost_input:,.3f}", f"{row.cost_output:,.3f}")
        console.print(table)
    print_notes(_notes(args, hardware, deployment, fitting, prompt))
    if args.plot is not None:
        console.print(f"The plot is in {args.plot}.", highlight=False, soft_wrap=True)
    return OK


def _hardware(name: str) -> Hardware:
    if name != HERE:
        return find_hardware(name)
    with terminal(stderr=True).status("measuring") as status:
        return measure(progress=lambda what: status.update(f"measuring {what}"))


def _memory_table(rows: list[PlanRow], helps: list[list[str]]) -> Table:
    table = simple_table("Memory of each device, GB", "tensor", "batch", "weights", "KV", "free")
    table.add_column("fits")
    for row, help in zip(rows, helps, strict=True):
        sizes = (number(size / 1e9) for size in (row.weight_bytes, row.kv_bytes, row.free_bytes))
        if row.fits:
            fits = f"yes, up to batch {row.largest_batch:,} or context {row.longest_context:,}"
        else:
            fits = f"no, but with {' or '.join(help)}" if help else "no"
        table.add_row(str(row.tensor), str(row.batch), *sizes, fits, style=None if row.fits else "dim")
    return table


def _phase_table(name: str, rows: list[PlanRow]) -> Table:
    """The prefill or the decode of every row that fits."""
    prefill = name == "prefill"
    speeds = ("TTFT", "tok/s") if prefill else ("TPOT", "tok/s/row", "tok/s")
    columns = (*speeds, "bound", "MFU", "MBU", "links", "FLOP/byte")
    table = simple_table(f"{name.capitalize()}, at best", "tensor", "batch", *columns)
    for row in rows:
        phase: Phase = getattr(row, name)
        rate = phase.counts.tokens / phase.seconds
        rates = map(number, (rate,) if prefill else (rate / row.batch, rate))
        shares = map(percent, (phase.mfu, phase.mbu, phase.communication_seconds / phase.seconds))
        cells = (duration(phase.seconds), *rates, _BOUNDS[phase.bound], *shares, number(phase.intensity))
        table.add_row(str(row.tensor), str(row.batch), *cells)
    return table


def _speculation_table(args: argparse.Namespace, rows: list[PlanRow]) -> Table:
    """The fastest round of every row that fits."""
    title = f"Speculation by {args.draft or 'drafts that cost nothing'}, acceptance {args.acceptance:g}"
    columns = "drafted", "tokens a round", "draft", "verify", "TPOT", "to plain"
    table = simple_table(title, "tensor", "batch", *columns)
    for row in rows:
        best = row.speculation
        times = map(duration, (best.draft_seconds, best.verify.seconds, best.tpot))
        cells = (str(best.draft_tokens), f"{best.tokens:.2f}", *times, f"{best.speedup:.2f}x")
        table.add_row(str(row.tensor), str(row.batch), *cells, style=None if best.speedup > 1 else "dim")
    return table


def _notes(
    args: argparse.Namespace, hardware: Hardware, deployment: Deployment, fitting: list[PlanRow], prompt: int
) -> Iterator[str]:
    fraction = args.memory_fraction
    yield (
        f"A device has {number(hardware.memory / 1e9)} GB, of which {fraction:.0%} is for weights and cache (JAX "
        f"takes 75% of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION={fraction:g} is set). A token's keys and values "
        f"take {deployment.kv_bytes_per_token / 1024:,.4g} KiB, all devices together."
    )
    if not fitting:
        return
    row = fitting[0]
    flops, rate = row.decode.counts.flops, row.decode.counts.flops / row.tpot
    limits = "their limits, and nothing runs faster: --efficiency 0.8 leaves a margin"
    limits = limits if args.efficiency == 1 else f"{args.efficiency:.0%} of their limits"
    roof = hardware.roof(deployment.config.dtype)
    yield f"Ridge: {roof}. Left of it a phase waits for memory, right of it for arithmetic."
    yield (
        f"TTFT: {prompt:,} prompt tokens a row, all rows together, in chunks of {PREFILL_CHUNK:,}. TPOT: a decode step "
        "at the full context, the slowest there is. Links: the part of the time that all-reduces take. "
        f"Arithmetic, memory and links run at {limits}."
    )
    yield (
        f"MFU and MBU are rates over rates: the decode step of tensor {row.tensor}, batch {row.batch} is "
        f"{flops / 1e9:,.3g} GFLOP a device, and in {duration(row.tpot)} that is {rate / 1e12:,.3g} TFLOP/s, "
        f"{row.decode.mfu:.2%} of the peak. Texts that give an 8 B model on an A100 16 GFLOP/s and 0.005% take FLOP a "
        "token for a rate: at 125 tokens/s it is 2 TFLOP/s, 0.64%."
    )


def _report(row: PlanRow, help: list[str]) -> dict[str, Any]:
    named = {name: getattr(row, name) for name in ("fits", "ttft", "tpot", "tokens_per_second")}
    plain = {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}
    if best := row.speculation:
        own = {"tpot": best.tpot, "speedup": best.speedup, "verify": _phase(best.verify)}
        plain |= {"speculation": dataclasses.asdict(best) | own}
    per_row = {"tokens_per_second_per_row": row.tpot and 1 / row.tpot, "remedies": help}
    return plain | named | per_row | {"prefill": _phase(row.prefill), "decode": _phase(row.decode)}


def _phase(phase: Phase | None) -> dict[str, Any] | None:
    return phase and dataclasses.asdict(phase) | {"bound": phase.bound, "intensity": phase.intensity}
