"""`ridgeline chat`: talk with a model in turns."""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from ..decode.buckets import PREFILL_CHUNK
from ..decode.engine.engine import Engine
from ..decode.prompts import make_request
from ..decode.sampling.params import SamplingParams
from .common import OK, UsageError, add_options, drafter_for, open_, terminal, usage_errors
from .formats import print_json
from .reply import Reply

_HELP = "/reset starts over, /quit or /exit leaves, as do Ctrl-C and Ctrl-D; Ctrl-C stops a reply; /help says this"
_HISTORY = 1000  # lines kept


def add_parser(commands: "argparse._SubParsersAction") -> None:
    parser = commands.add_parser(
        "chat", help="talk with a model", description=f"Talk with a model in turns: {_HELP}. A space goes before a "
        "message that begins with /.",
    )  # fmt: skip
    parser.add_argument("--system", metavar="TEXT", help="a system message to start with")
    parser.set_defaults(run=run)
    add_options(parser, max_tokens=400)


def run(args: argparse.Namespace) -> int:
    model, params, read = open_(args)
    if model.tokenizer is None:
        raise UsageError("this model has no tokenizer; chat needs one")
    options = {"kv_dtype": args.kv_dtype, "drafter": drafter_for(model, args)}
    start = [{"role": "system", "content": args.system}] if args.system else []
    with usage_errors():  # a template that is not there, or takes no system message
        model.tokenizer.apply_chat_template([*start, {"role": "user", "content": "Hello"}])
    model = read()
    with usage_errors():
        engine = Engine(model, 1, prefill_tokens=PREFILL_CHUNK, whole_batches=True, **options)
    with engine:
        with terminal(stderr=True).status("compiling"):  # shown on terminals only
            started = time.perf_counter()
            engine.warm_up(sampling=[params])
        terminal(stderr=True).print(f"compiled in {time.perf_counter() - started:.1f} s", style="dim", highlight=False)
        with line_editing() if sys.stdin.isatty() else contextlib.nullcontext():
            return _talk(engine, params, start, args.json)


def _talk(engine: Engine, params: SamplingParams, start: list[dict], as_json: bool) -> int:
    """Turns until the end; each finds the keys and values of those before it."""
    messages = list(start)
    interactive = sys.stdin.isatty()
    if interactive:
        print(_HELP, file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive and not as_json else "")
        except (EOFError, KeyboardInterrupt) as end:
            if interactive:
                print(file=sys.stderr)  # after the prompt
            if isinstance(end, KeyboardInterrupt):
                raise
            return OK
        match line.strip():
            case "":
                continue
            case "/quit" | "/exit":
                return OK
            case "/reset":
                messages = list(start)
                continue
            case "/help":
                print(_HELP, file=sys.stderr)
                continue
            case text if line.startswith("/"):
                print(f"ridgeline: there is no command {text.split()[0]}; {_HELP}", file=sys.stderr)
                continue
            case text:
                messages.append({"role": "user", "content": text})
        try:
            reply = _reply(engine, params, messages, show=not as_json)
        except UsageError as error:  # such as a conversation that has grown too long
            print(f"ridgeline: {error}; /reset starts over", file=sys.stderr)
            messages.pop()
            continue
        print_json(reply.as_dict()) if as_json else print(flush=True)
        if not as_json:
            reply.print_logprobs(engine.model.tokenizer)
        reply.print_summary()
        messages.append({"role": "assistant", "content": reply.text})


def _reply(engine: Engine, params: SamplingParams, messages: list[dict], show: bool) -> Reply:
    with usage_errors():
        request = make_request(engine.model, 0, messages, params, max_length=engine.sizes.max_length)
    before = engine.stats().cached_prompt_tokens
    index = engine.add(request)
    reply = Reply(show, len(request.prompt), None)
    reply.run(engine.run())
    reply.cached_tokens = engine.stats().cached_prompt_tokens - before
    if reply.output is None:
        engine.abort(index)
        list(engine.run())
    return reply


@contextlib.contextmanager
def line_editing() -> Iterator[None]:
    """Lines are edited with readline, where Python has it, and kept for the next time."""
    try:
        import readline
    except ImportError:  # Windows' consoles edit lines themselves
        yield
        return
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "ridgeline"
    readline.set_history_length(_HISTORY)
    with contextlib.suppress(OSError):  # the first time
        readline.read_history_file(folder / "chat_history")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # a home that cannot be written to
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            readline.write_history_file(folder / "chat_history")
