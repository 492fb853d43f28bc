"""How near each product of a model comes to the speed of memory: one row with every weight of a layer, in every format.

A row is a product as a decode step makes it, with weights of its shape in turns that are together larger than the last
cache; memory is read in the same turns. Those that fall furthest behind come first.
"""

import argparse
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

from ..cli.common import usage_errors
from ..cli.formats import integers, number
from ..model.layers import linear
from ..model.params import ParamSpec, float_specs
from ..model.presets import PRESETS, preset
from ..model.quantization import quantize
from ..model.schemes import SCHEMES
from . import subject as subjects
from .harness import Table
from .limits import REHEARSAL, Figure
from .subject import find_subject
from .timing import Turn, elapsed, in_turns

FORMATS = "float32,bfloat16,float16,int8,fp8,fp8-block,int4,int4-64,int4-32,int4-zero,int4-32-zero"
READ_BYTES = 1 << 22 if REHEARSAL else 1 << 27  # of each format's weights, and of what memory's speed is read from
PRODUCTS = ("qkv", "out", "gate_up", "down")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser, default="presets")
    add = parser.add_argument
    help = "dtypes, and schemes with activations in bfloat16 (default: %(default)s)"
    add("--formats", type=lambda text: text.split(","), default=FORMATS.split(","), metavar="FORMAT,...", help=help)
    add("--batch", type=integers, default=[1], metavar="B,...", help="rows (default: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="timings of each, in turns (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        specs = products(args)
        for name in args.formats:
            if name not in SCHEMES:
                jnp.dtype(name)
    rows = []
    bar = tqdm(total=len(specs) * len(args.formats), unit="weight", disable=None, leave=False)
    for name in args.formats:
        for title, spec in specs.items():
            rows += [{"product": title, "format": name, **row} for row in _measured(spec, name, args)]
            bar.update()
        yield {"subject": args.model, "rows": rows}
    bar.close()


def products(args: argparse.Namespace) -> dict[str, ParamSpec]:
    """The weights of a layer by name and shape; of "presets" one for each number of inputs that a preset has.

    The outputs of these are cut to what fits `READ_BYTES` in float32: it is the inputs that decide on the form.
    """
    if args.model != "presets":
        layers = float_specs(find_subject(args.model, args.layers, args.set, dtype=None).config)["layers"]
        return {f"{name} {spec.shape}": spec for name, spec in layers[0].items() if name in PRODUCTS}
    inputs = {}
    for name in PRESETS:
        config = preset(name)
        inputs |= {width: name for width in (config.embed_dim, config.ffn_dim)}
    return {
        f"{width} inputs": ParamSpec((READ_BYTES // 4 // width, width), "float32", ("ffn", "embed"), in_axes=1)
        for width in sorted(inputs)
    }


def _measured(spec: ParamSpec, name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    scheme = SCHEMES.get(name)

    @jax.jit
    def make(key: jax.Array) -> Any:
        w = jax.random.normal(key, spec.shape) * 0.02
        return w.astype(name) if scheme is None else quantize(w, scheme, spec.in_axes)

    first = make(jax.random.key(0))
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(first))
    weights = [first, *(make(jax.random.key(i)) for i in range(1, -(-READ_BYTES // nbytes)))]
    memory, vector = jnp.ones((READ_BYTES // 4096, 1024)), jnp.ones(1024)
    read = jax.jit(lambda memory: memory @ vector)

    @jax.jit
    def chain(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
        ys = []
        for w in weights:
            ys.append(linear(x, w, spec, out_dtype=jnp.float32))
            x, ys[-1] = lax.optimization_barrier((x, ys[-1]))  # one after the other, as in a step
        return ys

    def turn(program: Any, *arrays: Any) -> Turn:
        return lambda: {"call": elapsed(lambda: jax.block_until_ready(program(*arrays)))[0]}

    for batch in args.batch:
        x = jnp.ones((batch, *spec.shape[-spec.in_axes :]), name if scheme is None else "bfloat16")
        turns = {"memory": turn(read, memory), "product": turn(functools.partial(chain, x), weights)}
        timed, _ = in_turns(turns, args.repeats, turns)
        best = {what: runs["call"].min for what, runs in timed.items()}
        rate = nbytes * len(weights) / best["product"]
        yield {"batch": batch, "bytes": nbytes, "rate": rate, "bandwidth": memory.nbytes / best["memory"]}


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    rows = sorted(report["rows"], key=lambda row: row["rate"] / row["bandwidth"])
    columns = ("product", "format", "batch", "MB", "GB/s", "memory, GB/s", "share")
    yield Table(
        "",
        columns,
        [
            (
                *(row["product"], row["format"], str(row["batch"]), f"{row['bytes'] / 1e6:,.1f}"),
                *(number(row["rate"] / 1e9), number(row["bandwidth"] / 1e9), f"{row['rate'] / row['bandwidth']:.2f}"),
            )
            for row in rows
        ],
        names=2,
    )


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Every product beside the speed of memory, worst first."""
    for row in sorted(report["rows"], key=lambda row: row["rate"] / row["bandwidth"]):
        what = f"{row['product']}, {row['format']}, batch {row['batch']}"
        yield Figure(what, row["rate"] / 1e9, row["bandwidth"] / 1e9, "GB/s", rate=True)
