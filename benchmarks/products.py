"""How near each product of a model comes to the speed of memory: one row with every weight of a layer, in every format.

A row is a product as a decode step makes it, with weights of its shape in turns that are together larger than the last
cache; memory is read in the same turns. Those that fall furthest behind come first.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from tqdm import tqdm

from ..cli.common import usage_errors
from ..cli.formats import integers, number
from ..model.config import DTYPES, ModelConfig
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
CHAIN = 8  # products of a program, one after the other as in a step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    subjects.add_arguments(parser, default="presets")  # which stands for the widths of all of them
    add = parser.add_argument
    help = "dtypes, and schemes with activations in bfloat16 (default: %(default)s)"
    add("--formats", type=lambda text: text.split(","), default=FORMATS.split(","), metavar="FORMAT,...", help=help)
    add("--batch", type=integers, default=[1], metavar="B,...", help="rows (default: 1)")
    add("--repeats", type=int, default=5, metavar="N", help="timings of each, in turns (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        specs = _of_presets()
        if args.model != "presets":
            specs = of_layer(find_subject(args.model, args.layers, args.set, dtype=None).config)
        for name in args.formats:
            if name not in SCHEMES and name not in DTYPES:
                raise ValueError(f"format {name!r} is none of {', '.join([*DTYPES, *SCHEMES])}")
    rows: list[dict[str, Any]] = []
    for name in args.formats:
        rows += measured(specs, [name], args.batch, args.repeats)
        yield {"subject": args.model, "rows": rows}


def of_layer(config: ModelConfig) -> dict[str, ParamSpec]:
    """The weights of the first layer, by name and shape."""
    return {f"{name} {spec.shape}": spec for name, spec in float_specs(config)["layers"][0].items() if spec.in_axes}


def _of_presets() -> dict[str, ParamSpec]:
    """A weight for each number of inputs that a preset has, which decides on a product's form."""
    configs = [preset(name) for name in PRESETS]
    return {
        f"{width} inputs": ParamSpec((max(8, READ_BYTES // 16 // width), width), "float32", ("ffn", "embed"), in_axes=1)
        for width in sorted({width for config in configs for width in (config.embed_dim, config.ffn_dim)})
    }


def measured(
    specs: Mapping[str, ParamSpec], formats: Sequence[str], batches: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """The best rate of each product, by title, in each format, a dtype or a scheme; and of memory in the same turns."""
    cases = list(itertools.product(formats, specs.items(), batches))
    return [
        {"product": title, "format": name, "batch": batch, **_measured(spec, name, batch, repeats)}
        for name, (title, spec), batch in tqdm(cases, unit="product", disable=None, leave=False)
    ]


def _measured(spec: ParamSpec, name: str, batch: int, repeats: int) -> dict[str, Any]:
    scheme = SCHEMES.get(name)

    @jax.jit
    def make(key: jax.Array) -> Any:
        w = jax.random.normal(key, spec.shape) * 0.02
        return w.astype(name) if scheme is None else quantize(w, scheme, spec.in_axes)

    weights = [make(jax.random.key(0))]
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    wanted = -(-READ_BYTES // nbytes)
    weights += [jax.tree.map(jnp.copy, weights[0]) for _ in range(min(wanted, CHAIN) * -(-wanted // CHAIN) - 1)]
    chains = [weights[start : start + CHAIN] for start in range(0, len(weights), CHAIN)]
    memory, vector = jnp.ones((READ_BYTES // 4096, 1024)), jnp.ones(1024)

    @jax.jit
    def read(memory: jax.Array) -> jax.Array:
        return memory @ vector

    @jax.jit
    def chain(x: jax.Array, weights: list[Any]) -> list[jax.Array]:
        ys = []
        for w in weights:
            x, y = lax.optimization_barrier((x, linear(x, w, spec, out_dtype=jnp.float32)))
            ys.append(y)
        return ys

    def turn(program: Callable[..., Any], *arguments: Sequence[Any]) -> Turn:
        return lambda: {"call": elapsed(lambda: [jax.block_until_ready(program(*each)) for each in arguments])[0]}

    x = jnp.ones((batch, *spec.shape[-spec.in_axes :]), name if scheme is None else "bfloat16")
    turns = {"memory": turn(read, (memory,)), "product": turn(chain, *((x, weights) for weights in chains))}
    timed, _ = in_turns(turns, repeats, turns)
    best = {what: runs["call"].min for what, runs in timed.items()}
    return {
        "bytes": nbytes,
        "rate": nbytes * len(weights) / best["product"],
        "bandwidth": memory.nbytes / best["memory"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Worst first."""
    columns = ("product", "format", "batch", "MB", "GB/s", "memory, GB/s", "share")
    cells = [
        (
            *(row["product"], row["format"], str(row["batch"]), f"{row['bytes'] / 1e6:,.1f}"),
            *(number(row["rate"] / 1e9), number(row["bandwidth"] / 1e9), f"{row['rate'] / row['bandwidth']:.2f}"),
        )
        for row in _worst_first(rows)
    ]
    return Table("Products beside the speed of memory", columns, cells, names=2)


def _worst_first(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(rows, key=lambda row: row["rate"] / row["bandwidth"])


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    yield table(report["rows"])


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    for row in _worst_first(report["rows"]):
        what = f"{row['product']}, {row['format']}, batch {row['batch']}"
        yield Figure(what, row["rate"] / 1e9, row["bandwidth"] / 1e9, "GB/s", rate=True)
