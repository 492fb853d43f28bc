"""`ridgeline generate`: continue a text."""

import argparse
import json
import sys
from pathlib import Path

from ..decode.prompts import make_requests
from .common import OK, UsageError, add_options, load, read_text, terminal, usage_errors, warm_up_programs
from .reply import Reply


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "generate", help="continue a text", description="Continue a text, printing it as it is made."
    )
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads standard input")
    parser.add_argument("--file", type=Path, metavar="FILE", help="read the prompt from FILE instead")
    parser.set_defaults(run=run)
    add_options(parser, max_tokens=200)


def run(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    model, params = load(args)
    with usage_errors():
        make_requests(model, prompt, params)
    reply = Reply(show=not args.json)
    reply.compile_seconds = warm_up_programs(model, prompt, params, args.kv_dtype)
    if not args.json and sys.stdout.isatty():
        terminal().print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
    reply.run(model, prompt, params, args.kv_dtype)
    print(json.dumps({"prompt": prompt, **reply.as_dict()}, ensure_ascii=False) if args.json else "", flush=True)
    reply.print_summary()
    return OK


def _prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.file is None):
        raise UsageError("give a PROMPT, - for standard input, or --file FILE: one of them")
    if args.file is not None:
        return read_text("--file", args.file)
    return sys.stdin.read() if args.prompt == "-" else args.prompt
