"""`ridgeline generate`: continue a text."""

import argparse
import functools
import json
import sys
from pathlib import Path

from ..decode.generate import stream, warm_up
from ..decode.prompts import make_requests
from ..interrupts import INTERRUPTED
from . import batch
from .common import OK, UsageError, add_options, open_, read_text, usage_errors, while_compiling
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
    tokens = [request.prompt]
    compile = functools.partial(warm_up, model, tokens, params, kv_dtype=args.kv_dtype)
    model, compile_seconds = while_compiling(compile, read)
    reply = Reply(not args.json, len(request.prompt), compile_seconds, prompt if sys.stdout.isatty() else "")
    reply.run(stream(model, tokens, params, kv_dtype=args.kv_dtype))
    print(json.dumps({"prompt": prompt, **reply.as_dict()}, ensure_ascii=False) if args.json else "", flush=True)
    if not args.json:
        reply.print_logprobs(model.tokenizer)
    reply.print_summary()
    return INTERRUPTED if reply.output is None else OK


def _prompt(args: argparse.Namespace) -> str:
    if args.file is not None:
        return read_text("--file", args.file)
    return sys.stdin.read() if args.prompt == "-" else args.prompt
