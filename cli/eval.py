"""`ridgeline eval`: how well a model, in any of its numbers, predicts a text."""

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from ..decode.evaluate import Comparison, Evaluation, evaluate
from ..model.config import DTYPES
from ..model.loading import load_model
from ..sharding.mesh import make_mesh
from .common import OK, add_format_options, cache_compilations, print_notes, read_text, schemes, terminal, usage_errors
from .formats import print_json, simple_table


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "eval",
        help="measure how well a model predicts a text",
        description="Score a text token by token, each from those before it, through the KV cache: loss, perplexity "
        "and bits a byte, of any weight and KV scheme; and with --against how near that comes to the same model as "
        "its checkpoint has it.",
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    add("--model", default="bundled", metavar="DIR", help="a checkpoint directory, or 'bundled' (default)")
    add_format_options(parser)
    add("--tensor", type=int, default=1, metavar="N", help="devices that share every layer (default: 1)")
    add("--context", type=int, metavar="N", help="tokens a window (default: 1024, or the model's longest)")
    add("--stride", type=int, metavar="N", help="tokens from a window to the next (default: half the context)")
    add("--batch", type=int, default=4, metavar="B", help="windows that run together (default: %(default)s)")
    add("--limit", type=int, metavar="N", help="score the first N tokens alone")
    add("--against", choices=DTYPES, metavar="DTYPE", help="compare with the same checkpoint as it is, in DTYPE")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = read_text("--text", args.text)
    cache_compilations()
    with usage_errors():
        mesh = None if args.tensor == 1 else make_mesh(tensor=args.tensor)
    model = load_model(args.model, mesh=mesh, dtype=args.dtype, **schemes(args))
    against = args.against and load_model(args.model, mesh=mesh, dtype=args.against)
    with tqdm(unit="token", unit_scale=True, disable=None, leave=False) as bar, usage_errors():

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        windows = {"context": args.context, "stride": args.stride, "batch_size": args.batch, "limit": args.limit}
        scores = evaluate(model, text, kv_dtype=args.kv_dtype, against=against, progress=progress, **windows)
    names = {"text": args.text.name, "model": Path(args.model).name, "dtype": model.config.dtype}
    settings = names | schemes(args) | {"kv_dtype": args.kv_dtype}
    if args.json:
        print_json(settings | {"against": args.against} | scores.as_dict())
        return OK
    console = terminal()
    console.print(_table(settings, scores))
    if scores.comparison is not None:
        console.print(_comparison_table(scores, scores.comparison, args.against))
    print_notes([_note(scores)])
    return OK


def _table(settings: dict[str, Any], scores: Evaluation) -> Table:
    stored = {"weights": settings["quantize"] or settings["dtype"]}
    stored |= {"output": settings["quantize_output"], "KV": settings["kv_dtype"]}
    numbers = ", ".join(f"{what} {name}" for what, name in stored.items() if name)
    title = f"{settings['model']} on {settings['text']}: {numbers}"
    table = simple_table(title, "tokens", "bytes", "nats/token", "perplexity", "bits/byte")
    counts = f"{scores.tokens:,}", f"{scores.bytes:,}"
    table.add_row(*counts, f"{scores.loss:.4f}", f"{scores.perplexity:,.3f}", f"{scores.bits_per_byte:.4f}")
    return table


def _comparison_table(scores: Evaluation, compared: Comparison, dtype: str) -> Table:
    table = simple_table(f"Against {dtype}", "its nats/token", "loss", "same top-1", "KL, nats/token")
    losses = f"{compared.loss:.4f}", f"{scores.as_dict()['loss_delta']:+.3%}"
    table.add_row(*losses, f"{compared.agreement:.2%}", f"{compared.divergence:.6f}")
    return table


def _note(scores: Evaluation) -> str:
    least = scores.context - scores.stride + 1
    return (
        f"Every token but the first is scored once, in windows of {scores.context:,} tokens that start "
        f"{scores.stride:,} apart: after the first window, each from at least {least:,} tokens before it."
    )
