"""Prefill and decode of a model on this machine, each against the machine's own limits.

The time to the first token over prompt lengths and the time per output token over batch and context are set against the
limits of this machine, measured before and after: the fraction of the roof, the prediction, and where the rest of the
time goes.
"""

import argparse
import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..cli.common import add_format_options, at_least_one, terminal, usage_errors
from ..cli.formats import integers
from ..decode.generate import generate
from ..model.loading import Model
from ..model.params import count_parameters
from ..roofline.deployment import Deployment
from ..roofline.hardware import Hardware
from ..sharding.mesh import make_mesh
from . import subject as subjects
from .cells import Cell, cells_of, decode_cell, explain_growth, prefill_cell, scaling
from .decode_plot import plot
from .decode_tables import show
from .limits import Figure, better, measured_roof, roof_record
from .peers import Peer, check_installed, load
from .steps import (
    CHUNK,
    GREEDY,
    cache_bucket,
    chunks,
    decode_turn,
    kv_name,
    plan_steps,
    prefill_turn,
    random_prompts,
)
from .subject import Subject, find_subject, make_model
from .timing import Spread, Turn, in_turns, reason

__all__ = ["add_arguments", "figures", "measure", "plot", "show"]

OURS = "ridgeline"
_AGREEMENT_TOKENS = 32

Work = tuple[str, int, int]
"""What contenders do alike: the phase, rows, and tokens of a prompt or positions that steps see."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser, default="bundled")
    add_format_options(parser)
    add = parser.add_argument
    add("--prompt", type=integers, default=[128, 512], metavar="T,...", help="prompt tokens a row (default: 128,512)")
    add("--batch", type=integers, default=[1, 8], metavar="B,...", help="rows (default: 1,8); prompts run at the first")
    help = "positions that a decode step sees in the mean (default: 128,512)"
    add("--context", type=integers, default=[128, 512], metavar="S,...", help=help)
    add("--tokens", type=int, default=32, metavar="N", help="decode steps that are timed together (default: 32)")
    add("--tensor", type=integers, default=[1], metavar="N,...", help="devices that share every layer (default: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="timings of each, in turns (default: 5)")
    help = "run the same weights and prompts through it, eager and compiled, in the same turns"
    add("--compare", choices=("transformers",), help=help)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        subject = find_subject(args.model, args.layers, args.set, args.dtype, args.quantize, args.quantize_output)
        _check(args, subject)
        meshes = _meshes(args.tensor)
        kv = kv_name(subject.config, args.kv_dtype)
        deployments = {tensor: Deployment(subject.config, None, kv, tensor) for tensor in meshes}
    if args.compare:
        check_installed()
    dtype = subject.config.dtype
    before = {tensor: measured_roof([dtype], jax.devices()[:tensor]) for tensor in meshes}
    with usage_errors():
        _check_memory(args, deployments, before)
    contests, agreement = _contests(args, subject, meshes)
    after = {tensor: measured_roof([dtype], jax.devices()[:tensor]) for tensor in meshes}
    cells = [
        cell
        for tensor, results in contests.items()
        for cell in _cells(results, deployments[tensor], better(before[tensor], after[tensor]), args.tokens)
    ]
    yield {
        "subject": f"{subject.title} {dtype}",
        "model": subject.record | {"parameters": count_parameters(subject.config), "kv": kv},
        "tokens": args.tokens,
        "repeats": args.repeats,
        "dry_run": jax.default_backend() == "cpu" and max(meshes) > 1,
        "roofs": {tensor: roof_record(before[tensor], after[tensor], dtype) for tensor in meshes},
        "cells": [dataclasses.asdict(cell) for cell in cells],
        "scaling": scaling(cells) if len(meshes) > 1 else [],
        "agreement": agreement,
    }


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    names = {"prefill": "TTFT", "decode": "TPOT"}
    for cell in cells_of(report):
        yield Figure(f"{cell.name}: {names[cell.phase]}", cell.seconds.median * 1e3, cell.predicted * 1e3, "ms")
        if "step" in cell.timings:
            step = cell.timings["step"].median
            yield Figure(f"{cell.name}: a step alone", step * 1e3, cell.predicted * 1e3, "ms")


def _check(args: argparse.Namespace, subject: Subject) -> None:
    """Refuse what needs no device to be refused."""
    at_least_one(args, "prompt", "batch", "context", "tensor", "tokens", "repeats")
    for name in ("prompt", "batch", "context", "tensor"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
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


def _meshes(tensors: Sequence[int]) -> dict[int, Any]:
    """A mesh a degree, None for one device. On a CPU as many devices are forced, where that can still be done."""
    if max(tensors) > 1 and "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # the devices are counted already, and `make_mesh` says what to do
            jax.config.update("jax_num_cpu_devices", max(tensors))
    return {tensor: None if tensor == 1 else make_mesh(tensor=tensor) for tensor in tensors}


def _check_memory(args: argparse.Namespace, deployments: dict[int, Deployment], roofs: dict[int, Hardware]) -> None:
    lengths = [plan_steps(context, args.tokens).capacity for context in args.context]
    sizes = [(batch, length) for batch in args.batch for length in lengths]
    sizes += [(args.batch[0], cache_bucket(prompt + 1)) for prompt in args.prompt]
    # A peer has weights of its own, and torch packs them anew into each program that it freezes.
    frozen = len(sizes) + 1 if jax.default_backend() == "cpu" else 0
    for tensor, deployment in deployments.items():
        copies = 2 + frozen if args.compare and tensor == 1 else 1
        subjects.check_memory(deployment, roofs[tensor].memory, sizes, copies)


_Results = tuple[dict[tuple[Work, str], dict[str, Spread]], dict[tuple[Work, str], str]]


def _contests(
    args: argparse.Namespace, subject: Subject, meshes: dict[int, Any]
) -> tuple[dict[int, _Results], dict[str, Any] | None]:
    """All timings, by tensor degree, and whether peers make the same tokens."""
    contests: dict[int, _Results] = {}
    agreement = None
    with tempfile.TemporaryDirectory(prefix="ridgeline-bench-") as scratch:
        checkpoint, theirs = None, None
        if args.compare:
            with terminal(stderr=True).status("preparing transformers"):
                checkpoint = None if subject.hf is None else Path(scratch)
                theirs = load(subject, checkpoint)
        for tensor, mesh in meshes.items():
            with terminal(stderr=True).status("making the weights"):
                model = make_model(subject, mesh, checkpoint)
            peers = [] if theirs is None or tensor > 1 else [Peer(theirs, compiled) for compiled in (False, True)]
            turns = _turns(args, model, peers)
            required = {(work, OURS) for work, _ in turns}
            with tqdm(total=len(turns) * (args.repeats + 1), unit="turn", disable=None, leave=False) as bar:
                contests[tensor] = in_turns(turns, args.repeats, required, lambda _, bar=bar: bar.update())
            if peers:
                agreement = _agreement(model, peers, min(args.prompt))
            del model
    return contests, agreement


def _turns(args: argparse.Namespace, model: Model, peers: Sequence[Peer]) -> dict[tuple[Work, str], Turn]:
    vocab_size, batch = model.config.vocab_size, args.batch[0]
    turns = {}
    for length in args.prompt:
        work = ("prefill", batch, length)
        prompts = random_prompts(vocab_size, batch, length)
        turns[work, OURS] = prefill_turn(model, prompts, args.kv_dtype)
        turns |= {(work, peer.name): peer.prefill_turn(prompts) for peer in peers}
    for batch in args.batch:
        for length in args.context:
            work, steps = ("decode", batch, length), plan_steps(length, args.tokens)
            turns[work, OURS] = decode_turn(model, batch, steps, args.kv_dtype)
            prompts = random_prompts(vocab_size, batch, steps.cached)
            turns |= {(work, peer.name): peer.decode_turn(prompts, steps) for peer in peers}
    return turns


def _agreement(model: Model, peers: Sequence[Peer], length: int) -> dict[str, Any]:
    """The greedy tokens of a prompt, ours beside each peer's."""
    count = min(_AGREEMENT_TOKENS, model.config.max_position - length)
    prompts = random_prompts(model.config.vocab_size, 1, length)
    ours = generate(model, prompts.tolist(), dataclasses.replace(GREEDY, max_tokens=count))[0].tokens
    agreement: dict[str, Any] = {"prompt": length, "tokens": count, OURS: ours}
    for peer in peers:
        try:
            made = peer.greedy(prompts, count)[0]
        except Exception as error:  # as in `in_turns`: a peer that fails is a result
            agreement[peer.name] = {"failure": reason(error)}
            continue
        equal = np.equal(ours, made)
        first = None if equal.all() else int(np.argmin(equal))
        agreement[peer.name] = {"equal": int(equal.sum()), "first_difference": first, "tokens": made}
    return agreement


def _cells(results: _Results, deployment: Deployment, roof: Hardware, tokens: int) -> list[Cell]:
    timings, failures = results
    prefills, decodes = [], []
    for (phase, batch, length), name in timings:
        if name != OURS:
            continue
        work = (phase, batch, length)
        peers = {other: timed[other] for (theirs, other), timed in timings.items() if theirs == work and other != OURS}
        out = {other: why for (theirs, other), why in failures.items() if theirs == work}
        shared = {"batch": batch, "peers": peers, "failures": out}
        if phase == "prefill":
            sizes = {"prompt": length, "chunk": CHUNK, "padded": sum(width for _, width in chunks(length))}
            prefills.append(prefill_cell(deployment, roof, timings[work, OURS], **sizes, **shared))
        else:
            steps = plan_steps(length, tokens)
            sizes = {"cached": steps.cached, "steps": steps.count}
            decodes.append(decode_cell(deployment, roof, timings[work, OURS], **sizes, **shared))
    return prefills + explain_growth(decodes)
