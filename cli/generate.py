"""`ridgeline generate`: continue a text."""

import argparse
import sys
import time
from pathlib import Path

from ..decode.generate import stream, warm_up
from ..decode.prompts import make_requests
from ..interrupts import INTERRUPTED
from . import batch
from .common import OK, UsageError, add_options, drafter_for, open_, read_text, usage_errors
from .formats import print_json
from .reply import Reply


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, printing it as it is made. A FILE that ends in .jsonl has many prompts, a line "
        'each: a text in quotes, or an object with "prompt" or "messages" and perhaps sampling fields of its own. They '
        "run together, and a JSON object a line is printed for each, a list of several samples; on a terminal, texts.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads standard input")
    parser.add_argument("--file", type=Path, metavar="FILE", help="read the prompt, or prompts, from FILE")
    parser.set_defaults(run=run)
    parser.add_argument("--n", type=int, metavar="N", help="samples of the prompt, of consecutive seeds (default: 1)")
    add_options(parser, max_tokens=200)


def run(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.file is None):
        raise UsageError("give a PROMPT, - for standard input, or --file FILE: one of them")
    if args.file is not None and args.file.suffix == ".jsonl":
        return batch.run(args, batch.read_lines(args.file), as_texts=sys.stdout.isatty() and not args.json)
    prompt = _prompt(args)
    if args.n is not None and args.n > 1:
        return batch.run(args, [batch.Line("PROMPT", prompt, {})], as_texts=not args.json)
    model, params, read = open_(args)
    with usage_errors():
        (request,) = make_requests(model, prompt, params)
    tokens, options = [request.prompt], {"kv_dtype": args.kv_dtype, "drafter": drafter_for(model, args)}
    started = time.perf_counter()
    model = warm_up(model, tokens, params, **options, meanwhile=read)
    seconds = time.perf_counter() - started
    reply = Reply(not args.json, len(request.prompt), seconds, prompt if sys.stdout.isatty() else "")
    reply.run(stream(model, tokens, params, **options))
    print_json({"prompt": prompt, **reply.as_dict()}) if args.json else print(flush=True)
    if not args.json:
        reply.print_logprobs(model.tokenizer)
    reply.print_summary()
    return INTERRUPTED if reply.output is None else OK


def _prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        return read_text("--file", args.file)
    return sys.stdin.read() if args.prompt == "-" else args.prompt
