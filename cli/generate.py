"""`ridgeline generate`: continue a text."""

import argparse
import functools
import sys
from pathlib import Path

from ..decode.generate import stream, warm_up
from ..decode.prompts import make_requests
from . import batch
from .common import OK, UsageError, add_options, open_, read_text, terminal, usage_errors, while_compiling
from .formats import print_json
from .reply import Reply


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continue a text, printing it as it is made. A FILE that ends in .jsonl has many prompts, a line "
        'each: a text in quotes, or an object with "prompt" or "messages" and perhaps sampling fields of its own. They '
        "run together, and a JSON object a line is printed for each; on a terminal, its text.",
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads standard input")
    parser.add_argument("--file", type=Path, metavar="FILE", help="read the prompt, or prompts, from FILE")
    parser.set_defaults(run=run)
    add_options(parser, max_tokens=200)


def run(args: argparse.Namespace) -> int:
    if (args.prompt is None) == (args.file is None):
        raise UsageError("give a PROMPT, - for standard input, or --file FILE: one of them")
    if args.file is not None and args.file.suffix == ".jsonl":
        return batch.run(args)
    prompt = _prompt(args)
    model, params, read = open_(args)
    with usage_errors():
        (request,) = make_requests(model, prompt, params)
    compile = functools.partial(warm_up, model, prompt, params, kv_dtype=args.kv_dtype)
    model, compile_seconds = while_compiling(compile, read)
    reply = Reply(not args.json, len(request.prompt), compile_seconds)
    if not args.json and sys.stdout.isatty():
        terminal().print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
    reply.run(stream(model, prompt, params, kv_dtype=args.kv_dtype))
    print_json({"prompt": prompt, **reply.as_dict()}) if args.json else print(flush=True)
    reply.print_summary()
    return OK


def _prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        return read_text("--file", args.file)
    return sys.stdin.read() if args.prompt == "-" else args.prompt
