"""`ridgeline chat`: talk with a model in turns."""

import argparse
import sys
import time

from ..decode.buckets import PREFILL_CHUNK
from ..decode.engine.engine import Engine
from ..decode.prompts import make_request
from ..decode.sampling.params import SamplingParams
from .common import OK, UsageError, add_options, load, terminal, usage_errors
from .formats import print_json
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
    with usage_errors():
        engine = Engine(model, 1, prefill_tokens=PREFILL_CHUNK, kv_dtype=args.kv_dtype, whole_batches=True)
    with engine:
        return _talk(engine, params, args)


def _talk(engine: Engine, params: SamplingParams, args: argparse.Namespace) -> int:
    """Turns until the end; each finds the keys and values of those before it."""
    start = [{"role": "system", "content": args.system}] if args.system else []
    messages = list(start)
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
            reply = _reply(engine, params, messages, show=not args.json)
        except UsageError as error:  # such as a conversation that has grown too long
            print(f"ridgeline: {error}; /reset starts over", file=sys.stderr)
            messages.pop()
            continue
        print_json(reply.as_dict()) if args.json else print(flush=True)
        reply.print_summary()
        messages.append({"role": "assistant", "content": reply.text})


def _reply(engine: Engine, params: SamplingParams, messages: list[dict], show: bool) -> Reply:
    with usage_errors():
        request = make_request(engine.model, 0, messages, params, max_length=engine.sizes.max_length)
    compile_seconds = None
    if not engine.stats().steps:
        with terminal(stderr=True).status("compiling"):  # shown on terminals only
            started = time.perf_counter()
            engine.warm_up(sampling=[params])
            compile_seconds = time.perf_counter() - started
    before = engine.stats().cached_prompt_tokens
    index = engine.add(request)
    reply = Reply(show, len(request.prompt), compile_seconds)
    reply.run(engine.run())
    reply.cached_tokens = engine.stats().cached_prompt_tokens - before
    if reply.output is None:
        engine.abort(index)
        list(engine.run())
    return reply
