"""Prefill and decode of a model on this machine, each against the machine's own limits.

The time to the first token over prompt lengths and the time per output token over batch and context are set against the
limits of this machine, measured in the same run: the fraction of the roof, the prediction, and where the rest of the
time goes.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..cli.common import OK, add_format_options, terminal, usage_errors
from ..cli.formats import integers
from ..decode import buckets
from ..decode.cache import page_dtype
from ..decode.generate import generate
from ..model.loading import Model
from ..model.params import count_parameters
from ..roofline.deployment import Deployment
from ..roofline.hardware import Hardware
from ..roofline.measure import measure
from ..roofline.plot import check_plot
from ..sharding.mesh import make_mesh
from .cells import BenchCell, better, decode_cell, drift, explain_growth, prefill_cell, scaling
from .decode_plot import plot_bench
from .decode_tables import notes, tables
from .environment import RESULTS, Others, hardware, now, store, versions
from .peers import Peer, check_installed, load, write_random_weights
from .steps import (
    GREEDY,
    OURS,
    Contest,
    decode_turn,
    in_turns,
    padded_prompt,
    plan_steps,
    prefill_turn,
    random_prompts,
)
from .subject import (
    SETTABLE,
    Subject,
    check_memory,
    checkpoint_directory,
    find_subject,
    make_model,
    write_config,
)

_AGREEMENT_TOKENS = 32


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        nargs="?",
        default="bundled",
        help="a preset, with random weights; a directory with a model; or 'bundled' (default)",
    )
    add("--layers", type=int, metavar="N", help="of a preset, run N layers")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help=f"of a preset, change a size; repeatable. Fields: {', '.join(SETTABLE)}",
    )
    add_format_options(parser)
    add("--prompt", type=integers, default=[128, 512], metavar="T,...", help="prompt tokens a row (default: 128,512)")
    add("--batch", type=integers, default=[1, 8], metavar="B,...", help="rows (default: 1,8); prompts run at the first")
    add(
        "--context",
        type=integers,
        default=[128, 512],
        metavar="S,...",
        help="positions that a decode step sees in the mean (default: 128,512)",
    )
    add("--tokens", type=int, default=32, metavar="N", help="decode steps that are timed together (default: 32)")
    add("--tensor", type=integers, default=[1], metavar="N,...", help="devices that share every layer (default: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="timings of each, in turns (default: 5)")
    add(
        "--compare",
        choices=("transformers",),
        help="run the same weights and prompts through it, eager and compiled, in the same turns",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="where the results are stored (default: decode-MODEL-DEVICE.json in benchmarks/results of a checkout, or "
        "here)",
    )
    add("--plot", type=Path, metavar="FILE", help="draw the results to a .png, .pdf or .svg")
    add("--json", action="store_true", help="print the results as one JSON object instead of tables")


def run(args: argparse.Namespace) -> int:
    with usage_errors():
        subject = find_subject(args.model, args.layers, args.set, args.dtype, args.quantize, args.quantize_output)
        _check(args, subject)
        meshes = _meshes(args.tensor)
        kv = args.kv_dtype or page_dtype(None, subject.config, None).name
        deployments = {tensor: Deployment(subject.config, None, kv, tensor) for tensor in meshes}
    if args.compare:
        check_installed()
    dtype = subject.config.dtype
    others = Others()
    before = {tensor: _roof(tensor, dtype) for tensor in meshes}
    with usage_errors():
        _check_memory(args, subject, deployments, before)
    contests, agreement = _measure(args, subject, meshes)
    after = {tensor: _roof(tensor, dtype) for tensor in meshes}
    roofs = {tensor: better(before[tensor], after[tensor]) for tensor in meshes}
    cells = [
        cell
        for tensor, found in contests.items()
        for cell in _cells(found, deployments[tensor], roofs[tensor], args.tokens)
    ]
    device = jax.devices()[0]
    report = {
        "benchmark": "decode",
        "date": now(),
        "command": args.command,
        "hardware": hardware() | {"device": device.device_kind, "devices": jax.device_count()},
        "versions": versions("ridgeline", "jax", "jaxlib", "jax-cuda13-plugin", "numpy", "torch", "transformers"),
        "model": {
            "name": Path(subject.name).name,
            "changes": dict(subject.changes),
            "parameters": count_parameters(subject.config),
            "dtype": dtype,
            "quantize": args.quantize,
            "quantize_output": args.quantize_output,
            "kv": kv,
            "random_weights": subject.hf is not None,
        },
        "tokens": args.tokens,
        "repeats": args.repeats,
        "cores_busy_with_others": others.cores(),
        "dry_run": _dry_run(meshes),
        "roofs": {
            tensor: {
                "used": dataclasses.asdict(roofs[tensor]),
                "before": dataclasses.asdict(before[tensor]),
                "after": dataclasses.asdict(after[tensor]),
                "drift": drift(before[tensor], after[tensor], dtype),
            }
            for tensor in meshes
        },
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "scaling": [dataclasses.asdict(row) for row in scaling(cells)] if len(meshes) > 1 else [],
        "agreement": agreement,
    }
    out = args.output or _default_output(subject, device.device_kind)
    store(report, out)
    size = f"{report['model']['parameters'] / 1e6:,.3g} M parameters, {_weights(args, dtype)}, KV {kv}"
    title = f"{Path(subject.name).name}{' scaled to' if subject.changes else ':'} {size}"
    if args.plot is not None:
        plot_bench(args.plot, title, roofs, dtype, cells)
    if args.json:
        print(json.dumps(report))
        return OK
    console = terminal()
    for table in tables(title, cells):
        console.print(table)
    for line in notes(report, cells, roofs):
        console.print(line, style="dim", highlight=False, soft_wrap=True)
    places = f"The results are in {out}" + (f", the plot in {args.plot}." if args.plot else ".")
    console.print(places, highlight=False, soft_wrap=True)
    return OK


def _weights(args: argparse.Namespace, dtype: str) -> str:
    output = f", output {args.quantize_output}" if args.quantize_output else ""
    return (f"{args.quantize} in {dtype}" if args.quantize else dtype) + output


def _check(args: argparse.Namespace, subject: Subject) -> None:
    """Refuse what needs no device to be refused."""
    for name in ("prompt", "batch", "context", "tensor"):
        for value in getattr(args, name):
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    for name in ("tokens", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    longest = subject.config.max_position
    for prompt in args.prompt:
        if prompt >= longest:
            raise ValueError(
                f"--prompt is {prompt}; {subject.name} takes {longest} positions and one must be left to generate"
            )
    for context in args.context:
        steps = plan_steps(context, args.tokens)
        if steps.cached + steps.count > longest:
            raise ValueError(
                f"--context {context} with --tokens {args.tokens} ends at {steps.cached + steps.count} positions; "
                f"{subject.name} was made for {longest}: lower one of them"
            )
    if args.compare and 1 not in args.tensor:
        raise ValueError(f"--compare runs on one device, and --tensor is {args.tensor}; put 1 among them")
    if args.plot is not None:
        check_plot(args.plot)
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise ValueError(f"--output {str(args.output)!r} is in no directory that exists; make it first")


def _meshes(tensors: Sequence[int]) -> dict[int, Any]:
    """A mesh a degree, None for one device. On a CPU as many devices are forced, where that can still be done."""
    if max(tensors) > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the devices are counted already, and `make_mesh` says what to do
            jax.config.update("jax_num_cpu_devices", max(tensors))
    return {tensor: None if tensor == 1 else make_mesh(tensor=tensor) for tensor in tensors}


def _dry_run(meshes: dict[int, Any]) -> bool:
    return jax.default_backend() == "cpu" and max(meshes) > 1


def _roof(tensor: int, dtype: str) -> Hardware:
    devices = jax.devices()[:tensor]
    with terminal(stderr=True).status("measuring") as status:
        return measure(devices, dtypes=[dtype], progress=lambda what: status.update(f"measuring {what}"))


def _check_memory(
    args: argparse.Namespace, subject: Subject, deployments: dict[int, Deployment], roofs: dict[int, Hardware]
) -> None:
    lengths = [plan_steps(context, args.tokens).capacity for context in args.context]
    sizes = [(batch, length) for batch in args.batch for length in lengths]
    sizes += [(args.batch[0], buckets.cache_bucket(prompt + 1)) for prompt in args.prompt]
    # A peer has weights of its own, and torch packs them anew into each program that it freezes.
    frozen = len(sizes) + 1 if jax.default_backend() == "cpu" else 0
    for tensor, deployment in deployments.items():
        check_memory(
            deployment,
            roofs[tensor].memory,
            sizes,
            random=subject.hf is not None,
            copies=2 + frozen if args.compare and tensor == 1 else 1,
        )


def _measure(
    args: argparse.Namespace, subject: Subject, meshes: dict[int, Any]
) -> tuple[dict[int, list[Contest]], dict[str, Any] | None]:
    """All timings, by tensor degree, and whether peers make the same tokens."""
    contests: dict[int, list[Contest]] = {}
    agreement = None
    with tempfile.TemporaryDirectory(prefix="ridgeline-bench-") as scratch:
        checkpoint, theirs = None, None
        if args.compare:
            with terminal(stderr=True).status("preparing transformers"):
                if subject.hf is None:
                    theirs = load(checkpoint_directory(subject), subject.config.dtype)
                else:
                    write_config(subject, checkpoint := Path(scratch) / "weights")
                    theirs = write_random_weights(checkpoint, subject.config.dtype)
        for tensor, mesh in meshes.items():
            with terminal(stderr=True).status("making the weights"):
                model = make_model(subject, mesh, checkpoint)
            peers = [] if theirs is None or tensor > 1 else [Peer(theirs, compiled) for compiled in (False, True)]
            contests[tensor] = _contests(args, model, peers)
            turns = sum(len(contest.turns) for contest in contests[tensor])
            with tqdm(total=turns * (args.repeats + 1), unit="turn", disable=None, leave=False) as bar:

                def tick(what: str, bar: tqdm = bar) -> None:
                    bar.set_description(what, refresh=False)
                    bar.update()

                in_turns(contests[tensor], args.repeats, tick)
            if peers:
                agreement = _agreement(model, peers, min(args.prompt))
            del model
    return contests, agreement


def _contests(args: argparse.Namespace, model: Model, peers: Sequence[Peer]) -> list[Contest]:
    vocab_size, batch = model.config.vocab_size, args.batch[0]
    found = []
    for length in args.prompt:
        prompts = random_prompts(vocab_size, batch, length)
        turns = {OURS: prefill_turn(model, prompts, args.kv_dtype)}
        turns |= {peer.name: peer.prefill_turn(prompts) for peer in peers}
        found.append(Contest("prefill", batch, length, turns))
    for batch in args.batch:
        for length in args.context:
            steps = plan_steps(length, args.tokens)
            prompts = random_prompts(vocab_size, batch, steps.cached)
            turns = {OURS: decode_turn(model, batch, steps, args.kv_dtype)}
            turns |= {peer.name: peer.decode_turn(prompts, steps) for peer in peers}
            found.append(Contest("decode", batch, length, turns))
    return found


def _agreement(model: Model, peers: Sequence[Peer], length: int) -> dict[str, Any]:
    """The greedy tokens of a prompt, ours beside each peer's."""
    count = min(_AGREEMENT_TOKENS, model.config.max_position - length)
    prompts = random_prompts(model.config.vocab_size, 1, length)
    ours = generate(model, prompts.tolist(), dataclasses.replace(GREEDY, max_tokens=count))[0].tokens
    found: dict[str, Any] = {"prompt": length, "tokens": count, "ridgeline": ours}
    for peer in peers:
        try:
            made = peer.greedy(prompts, count)[0]
        except Exception as error:  # as in `in_turns`: a peer that fails is a finding
            found[peer.name] = {"failure": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        equal = np.equal(ours, made)
        first = None if equal.all() else int(np.argmin(equal))
        found[peer.name] = {"equal": int(equal.sum()), "first_difference": first, "tokens": made}
    return found


def _cells(contests: list[Contest], deployment: Deployment, roof: Hardware, tokens: int) -> list[BenchCell]:
    prefills, decodes = [], []
    for contest in contests:
        names = [name for name in contest.turns if name != OURS]
        runs = {name: found for name, found in contest.runs.items() if name not in names}
        shared = {
            "batch": contest.batch,
            "runs": runs,
            "peers": {name: contest.runs[name] for name in names if name in contest.runs},
            "failures": contest.failures,
        }
        if contest.phase == "prefill":
            padded = padded_prompt(contest.length)
            sizes = {"prompt": contest.length, "chunk": buckets.PREFILL_CHUNK, "padded": padded}
            prefills.append(prefill_cell(deployment, roof, **sizes, **shared))
        else:
            steps = plan_steps(contest.length, tokens)
            sizes = {"cached": steps.cached, "steps": steps.count, "block": steps.block}
            decodes.append(decode_cell(deployment, roof, **sizes, **shared))
    return prefills + explain_growth(decodes)


def _default_output(subject: Subject, kind: str) -> Path:
    folder = RESULTS if RESULTS.is_dir() else Path.cwd()
    words = [Path(subject.name).name, *(["scaled"] if subject.changes else []), subject.config.dtype, kind]
    return folder / f"decode-{re.sub(r'[^a-z0-9.]+', '-', '-'.join(words).lower())}.json"
