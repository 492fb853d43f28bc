"""`ridgeline eval`: how well a model, in any of its numbers, predicts a text."""

import argparse
import json
from pathlib import Path
from typing import Any

from rich.table import Table
from tqdm import tqdm

from ..decode.score import Comparison, Evaluation, evaluate
from ..model.config import DTYPES
from ..model.loading import load_model
from ..sharding.mesh import make_mesh
from .common import OK, UsageError, add_format_options, cache_compilations, terminal, usage_errors
from .formats import simple_table


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
    text = _text(args.text)
    cache_compilations()
    with usage_errors():
        mesh = None if args.tensor == 1 else make_mesh(tensor=args.tensor)
    schemes = {"quantize": args.quantize, "quantize_output": args.quantize_output}
    model = load_model(args.model, mesh=mesh, dtype=args.dtype, **schemes)
    against = args.against and load_model(args.model, mesh=mesh, dtype=args.against)
    with tqdm(unit="token", unit_scale=True, disable=None, leave=False) as bar, usage_errors():

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = evaluate(
            model,
            text,
            context=args.context,
            stride=args.stride,
            batch_size=args.batch,
            kv_dtype=args.kv_dtype,
            limit=args.limit,
            against=against,
            progress=progress,
        )
    settings = {
        "text": args.text.name,
        "model": Path(args.model).name,
        "dtype": model.config.dtype,
        "quantize": args.quantize,
        "quantize_output": args.quantize_output,
        "kv_dtype": args.kv_dtype,
    }
    if args.json:
        print(json.dumps(settings | {"against": args.against} | found.as_dict()))
        return OK
    console = terminal()
    console.print(_table(settings, found))
    if found.comparison is not None:
        console.print(_comparison_table(found, found.comparison, args.against))
    console.print(_note(found), style="dim", highlight=False, soft_wrap=True)
    return OK


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"--text {file} is not UTF-8: {error}; convert it, with iconv for one") from None
    except OSError as error:
        raise UsageError(f"--text {file} cannot be read: {error.strerror}; name a text file") from None
    if not text:
        raise UsageError(f"--text {file} is empty; name a file with some text in it")
    return text


def _table(settings: dict[str, Any], found: Evaluation) -> Table:
    numbers = [f"weights {settings['quantize'] or settings['dtype']}"]
    if settings["quantize_output"]:
        numbers.append(f"output {settings['quantize_output']}")
    if settings["kv_dtype"]:
        numbers.append(f"KV {settings['kv_dtype']}")
    title = f"{settings['model']} on {settings['text']}: {', '.join(numbers)}"
    table = simple_table(title, "tokens", "bytes", "nats/token", "perplexity", "bits/byte")
    table.add_row(
        f"{found.tokens:,}",
        f"{found.bytes:,}",
        f"{found.loss:.4f}",
        f"{found.perplexity:,.3f}",
        f"{found.bits_per_byte:.4f}",
    )
    return table


def _comparison_table(found: Evaluation, compared: Comparison, dtype: str) -> Table:
    table = simple_table(f"Against {dtype}", "its nats/token", "loss", "same top-1", "KL, nats/token")
    table.add_row(
        f"{compared.loss:.4f}",
        f"{found.as_dict()['loss_delta']:+.3%}",
        f"{compared.agreement:.2%}",
        f"{compared.divergence:.6f}",
    )
    return table


def _note(found: Evaluation) -> str:
    least = found.context - found.stride + 1
    return (
        f"Every token but the first is scored once, in windows of {found.context:,} tokens that start {found.stride:,} "
        f"apart: after the first window, each from at least {least:,} tokens before it."
    )
