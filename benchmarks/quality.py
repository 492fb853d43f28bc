"""What every weight scheme and every KV scheme costs of a model's predictions, and the bytes that it saves.

Each is scored on the held-out parts of the books that the bundled models were trained on (`--text` is that file; see
`training/data.py` and the model card), beside the model in float32. Weights are rounded from the checkpoint's own,
activations are bfloat16.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

import ridgeline as rl

from ..cli.common import OK, UsageError
from ..decode.score import evaluate
from ..model.schemes import SCHEMES
from ..roofline.plot import check_plot
from ..training.data import read_books, split_book
from .environment import hardware, now, store, versions

KV_SCHEMES = (None, "int8", "fp8")


@dataclasses.dataclass(frozen=True)
class Weights:
    """How a row's weights are stored: the layers' and the output projection's scheme, and the dtype of all else."""

    layers: str | None = None
    output: str | None = None
    dtype: str = "bfloat16"

    def __str__(self) -> str:
        output = f"+out-{self.output}" if self.output else ""
        return f"{self.layers or self.dtype}{output}"


WEIGHTS = (
    Weights(dtype="float32"),
    Weights(),
    *(Weights(layers=name) for name in SCHEMES),
    Weights(layers="int8", output="int8"),
    Weights(layers="int4-32", output="int8"),
)
PLAIN = Weights()

_CAPTION = (
    "MB: parameters read a token. KV B: keys and values a token. nats: loss a token, and how far above the loss in "
    "bfloat16 and in float32 it is. top-1, KL: against float32."
)


def measure(
    model: str, texts: Sequence[str], weights: Sequence[Weights], limit: int | None, bar: Any
) -> list[dict[str, Any]]:
    """A row for every one of `weights` with every KV scheme.

    Args:
      model: as `load_model` takes it.
      texts: to score, each on its own.
      weights: the first of them is `PLAIN` or before it.
      limit: of tokens, as `evaluate` takes it.
      bar: of tqdm, counting rows.

    Returns:
      What `Evaluation.as_dict` has (`loss_delta` is of float32), the schemes, `loss_delta_bfloat16`, `parameter_bytes`
      read a token and `kv_bytes` a token of the cache.
    """
    reference = rl.load_model(model, dtype="float32")
    rows = []
    for stored in weights:
        schemes = {"quantize": stored.layers, "quantize_output": stored.output}
        loaded = rl.load_model(model, dtype=stored.dtype, **schemes)
        for kv in KV_SCHEMES:
            before = len(rows)

            def progress(done: int, total: int, before: int = before) -> None:
                bar.update(before + done / total - bar.n)

            bar.set_description(f"{stored}, KV {kv}")
            found = evaluate(loaded, texts, kv_dtype=kv, limit=limit, against=reference, progress=progress)
            cache = rl.init_cache(loaded.config, 1, 64, kv_dtype=kv)
            rows.append(
                {
                    "weights": str(stored),
                    "kv": kv or cache.k[0].dtype.name,
                    "parameter_bytes": parameter_bytes(loaded.params),
                    "kv_bytes": cache.nbytes // cache.capacity,
                    **found.as_dict(),
                }
            )
    plain = next(row["loss"] for row in rows if row["weights"] == str(PLAIN))
    return [row | {"loss_delta_bfloat16": row["loss"] / plain - 1} for row in rows]


def parameter_bytes(params: rl.model.params.Params) -> int:
    """Bytes that a decode step of one row reads: all parameters, of an embedding that is not the output one row."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    embedding = params["embedding"]
    return total - embedding[1:].nbytes if "unembedding" in params else total


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows as they are printed."""
    found = Table(box=box.SIMPLE_HEAD, padding=0, caption=_CAPTION, caption_justify="left")
    found.add_column("weights", no_wrap=True)
    for name in ("KV", "MB", "KV B", "nats", "to bf16", "to f32", "top-1", "KL"):
        found.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        found.add_row(
            row["weights"],
            row["kv"],
            f"{row['parameter_bytes'] / 1e6:.2f}",
            f"{row['kv_bytes']:,}",
            f"{row['loss']:.4f}",
            f"{row['loss_delta_bfloat16']:+.2%}",
            f"{row['loss_delta']:+.2%}",
            f"{row['top1_agreement']:.1%}",
            f"{row['kl_divergence']:.5f}",
        )
    return found


def plot(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Loss and divergence against the bytes of parameters a token: a color a weight scheme, a marker a KV scheme."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 6), layout="constrained")
    figure.suptitle(title)
    loss, divergence = figure.subplots(1, 2)
    colors = dict(zip(dict.fromkeys(row["weights"] for row in rows), colormaps["tab20"].colors, strict=False))
    markers = dict(zip(dict.fromkeys(row["kv"] for row in rows), "os^D", strict=False))
    for row in rows:
        look = {"color": colors[row["weights"]], "marker": markers[row["kv"]], "linestyle": "", "fillstyle": "none"}
        loss.plot(row["parameter_bytes"] / 1e6, row["loss"], **look)
        if row["kl_divergence"] > 0:
            divergence.plot(row["parameter_bytes"] / 1e6, row["kl_divergence"], **look)
    for name, color in colors.items():
        divergence.plot([], [], "o", color=color, label=name)
    for kv, marker in markers.items():
        divergence.plot([], [], marker, color="black", fillstyle="none", label=f"KV {kv}")
    divergence.set_yscale("log")
    for axes, label in ((loss, "held-out loss, nats a token"), (divergence, "KL(float32 || scheme), nats a token")):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("parameters read a token, MB")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    divergence.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="the books, parted by a line <|story|>")
    add("--json", type=Path, required=True, metavar="OUT", help="where the results are stored")
    add("--plot", type=Path, metavar="OUT", help="draw loss against bytes to a .png, .pdf or .svg")
    add("--model", default="bundled", metavar="DIR", help="a checkpoint directory, or 'bundled' (default)")
    add("--weights", metavar="NAME,...", help="only these, such as int4,int8+out-int8")
    add("--limit", type=int, metavar="N", help="score the first N tokens alone")


def run(args: argparse.Namespace) -> int:
    chosen = WEIGHTS
    if args.weights:
        named = {str(stored): stored for stored in WEIGHTS}
        unknown = [name for name in args.weights.split(",") if name not in named]
        if unknown:
            raise UsageError(f"--weights {unknown[0]!r} is not known; known: {', '.join(named)}")
        chosen = tuple(dict.fromkeys((PLAIN, *(named[name] for name in args.weights.split(",")))))
    if args.plot:
        try:
            check_plot(args.plot)
        except (ValueError, RuntimeError) as error:
            raise UsageError(str(error)) from None
    texts = [stretch for book in read_books(args.text) for stretch in split_book(book)[1]]
    if not texts:
        raise UsageError(f"--text {args.text} is too short to hold out 3 % of it by whole paragraphs")
    with tqdm(total=len(chosen) * len(KV_SCHEMES), unit="row", bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        rows = measure(args.model, texts, chosen, args.limit, bar)
    report = {
        "benchmark": "quality",
        "date": now(),
        "command": args.command,
        "hardware": hardware() | {"device": jax.devices()[0].device_kind},
        "versions": versions("ridgeline", "jax", "jaxlib", "jax-cuda13-plugin", "numpy"),
        "model": Path(args.model).name,
        "rows": rows,
    }
    store(report, args.json)
    title = f"{report['model']}, {rows[0]['tokens']:,} held-out tokens"
    console = Console()
    console.print(table(rows))
    console.print(f"{title}; stored in {args.json}", highlight=False, soft_wrap=True)
    if args.plot:
        plot(args.plot, title, rows)
    return OK
