"""`ridgeline chat`: talk with a model in turns."""

import argparse
import json
import sys

from ..decode import buckets
from ..decode.prompts import make_requests
from ..decode.sampling.params import SamplingParams
from ..model.loading import Model
from .common import OK, UsageError, add_options, load, usage_errors, warm_up_programs
from .reply import Reply


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model in turns. Ctrl-C stops a reply, /reset starts over, /exit or Ctrl-D leaves.",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message to start with")
    parser.set_defaults(run=run)
    add_options(parser, max_tokens=400)


def run(args: argparse.Namespace) -> int:
    model, params = load(args)
    if model.tokenizer is None:
        raise UsageError("this model has no tokenizer; chat needs one")
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages, compiled = list(start), set()
    interactive = sys.stdin.isatty()
    if interactive:
        print("Ctrl-C stops a reply, /reset starts over, /exit leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive and not args.json else "").strip()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return OK
        if line == "/exit":
            return OK
        if line == "/reset":
            messages = list(start)
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            reply = _reply(model, params, messages, compiled, args)
        except UsageError as error:  # such as a conversation that has grown too long
            print(f"ridgeline: {error}; /reset starts over", file=sys.stderr)
            messages.pop()
            continue
        print(json.dumps(reply.as_dict(), ensure_ascii=False) if args.json else "", flush=True)
        reply.print_summary()
        messages.append({"role": "assistant", "content": reply.text})


def _reply(
    model: Model, params: SamplingParams, messages: list[dict], compiled: set, args: argparse.Namespace
) -> Reply:
    with usage_errors():
        text = model.tokenizer.apply_chat_template(messages)
        tokens = model.tokenizer.encode(text, add_special_tokens=False)
        make_requests(model, [tokens], params)
    reply = Reply(show=not args.json)
    shapes = buckets.prefill_bucket(len(tokens)), buckets.cache_bucket(len(tokens) + (params.max_tokens or 0))
    if shapes not in compiled:
        compiled.add(shapes)
        reply.compile_seconds = warm_up_programs(model, [tokens], params, args.kv_dtype)
    reply.run(model, [tokens], params, args.kv_dtype)
    return reply
