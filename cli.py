"""The `ridgeline` command: it parses, calls and prints."""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported late, so that --help answers at once
    from rich.console import Console

    from .decode.sampling_params import SamplingParams
    from .model.loading import Model

OK, FAILURE, USAGE = 0, 1, 2

EXAMPLES = """\
examples:
  ridgeline generate "Once upon a time"
  ridgeline generate "The cat said" --temperature 0 --max-tokens 40
  ridgeline generate --file prompt.txt --model path/to/hf-checkpoint --json
  echo "There was a king" | ridgeline generate - --seed 7
  ridgeline chat --model path/to/hf-checkpoint
"""


class UsageError(Exception):
    """What the user asked for cannot be done as asked; the message says what to change."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments after the program's name; `sys.argv` by default.

    Returns:
      The exit code: 0 success, 1 a failure at run time, 2 bad usage.
    """
    try:
        args = _parser().parse_args(argv)
    except SystemExit as exit:  # argparse has printed what was wrong, or the help
        return exit.code if isinstance(exit.code, int) else USAGE
    try:
        return args.run(args)
    except UsageError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        return OK
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        return _fail(error, FAILURE)


def _fail(error: Exception, code: int) -> int:
    print(f"ridgeline: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    from importlib.metadata import version

    parser = argparse.ArgumentParser(
        prog="ridgeline",
        description="Run language models with JAX. A small story-telling model is included; no download is needed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ridgeline {version('ridgeline')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    generate = commands.add_parser(
        "generate", help="continue a text", description="Continue a text, printing it as it is made."
    )
    generate.add_argument("prompt", nargs="?", metavar="PROMPT", help="the text to continue; - reads standard input")
    generate.add_argument("--file", type=Path, metavar="FILE", help="read the prompt from FILE instead")
    generate.set_defaults(run=_generate)
    _add_options(generate, max_tokens=200)

    chat = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model in turns. Ctrl-C stops a reply, /reset starts over, /exit or Ctrl-D leaves.",
    )
    chat.add_argument("--system", metavar="TEXT", help="a system message to start with")
    chat.set_defaults(run=_chat)
    _add_options(chat, max_tokens=400)
    return parser


def _add_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model",
        default="bundled",
        metavar="DIR",
        help="a Hugging Face checkpoint directory, or 'bundled' for the included model (default)",
    )
    model.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and activations (default: the checkpoint's own)",
    )

    sampling = parser.add_argument_group("sampling (where no default is given, the model's own applies)")
    add = sampling.add_argument
    add("--max-tokens", type=int, default=max_tokens, metavar="N", help="most tokens to make (default: %(default)s)")
    add("--min-tokens", type=int, metavar="N", help="do not stop before N tokens")
    add("--temperature", type=float, metavar="T", help="0 always takes the likeliest token; higher is more varied")
    add("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens; 0 is no limit")
    add("--top-p", type=float, metavar="P", help="choose among the likeliest tokens that reach probability P together")
    add("--min-p", type=float, metavar="P", help="drop tokens less likely than P times the likeliest")
    add("--repetition-penalty", type=float, metavar="R", help="above 1 discourages tokens already in prompt or output")
    add("--presence-penalty", type=float, metavar="A", help="subtract A from the logits of tokens already made")
    add("--frequency-penalty", type=float, metavar="A", help="subtract A for each time a token was made")
    add("--logit-bias", action="append", type=_bias, metavar="ID=BIAS", help="add BIAS to a token's logit; repeatable")
    add("--seed", type=int, metavar="N", help="the same seed gives the same text (default: drawn anew)")
    add("--stop", action="append", metavar="TEXT", help="end before this text; repeatable")
    add("--stop-token-ids", action="append", type=int, metavar="ID", help="end at this token; repeatable")
    add("--ignore-eos", action="store_true", default=None, help="go on past the end-of-sequence token")
    add("--include-stop-str-in-output", action="store_true", default=None, help="keep the stop text in the output")
    add("--logprobs", type=int, metavar="N", help="report log-probabilities and the N likeliest tokens (with --json)")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of running text")


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 42=-5") from None


def _generate(args: argparse.Namespace) -> int:
    prompt = _prompt(args)
    model, params = _load(args)
    with _usage_errors():
        from .decode.generate import make_requests

        make_requests(model, prompt, params)
    compile_seconds = _warm_up(model, prompt, params)
    if not args.json and sys.stdout.isatty():
        _terminal().print(prompt, end="", style="bold", markup=False, highlight=False, soft_wrap=True)
    reply = _Reply(show=not args.json)
    reply.run(model, prompt, params)
    print(json.dumps({"prompt": prompt, **reply.as_dict()}, ensure_ascii=False) if args.json else "", flush=True)
    reply.print_summary(compile_seconds)
    return OK


def _chat(args: argparse.Namespace) -> int:
    model, params = _load(args)
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
        with _usage_errors():
            text = model.tokenizer.apply_chat_template(messages)
            tokens = model.tokenizer.encode(text, add_special_tokens=False)
        compile_seconds, shapes = None, _shapes(len(tokens), params)
        if shapes not in compiled:
            compiled.add(shapes)
            compile_seconds = _warm_up(model, [tokens], params)
        reply = _Reply(show=not args.json)
        reply.run(model, [tokens], params)
        print(json.dumps(reply.as_dict(), ensure_ascii=False) if args.json else "", flush=True)
        reply.print_summary(compile_seconds)
        messages.append({"role": "assistant", "content": reply.text})


class _Reply:
    """One streamed completion: printed as it comes, kept for the summary, whole or cut short by Ctrl-C."""

    def __init__(self, show: bool):
        self.show = show
        self.text, self.tokens, self.output = "", [], None
        self.started = self.first = self.last = time.perf_counter()
        self.prompt_tokens = 0

    def run(self, model: "Model", prompt: Any, params: "SamplingParams") -> None:
        from .decode.generate import make_requests, stream

        with _usage_errors():
            self.prompt_tokens = len(make_requests(model, prompt, params)[0].prompt)
            chunks = stream(model, prompt, params)
        self.started = time.perf_counter()
        with contextlib.suppress(KeyboardInterrupt):
            for chunk in chunks:
                self.last = time.perf_counter()
                self.first = self.last if not self.tokens else self.first
                self.text, self.output = self.text + chunk.text, chunk.output
                self.tokens += chunk.tokens
                if self.show:
                    print(chunk.text, end="", flush=True)

    def as_dict(self) -> dict[str, Any]:
        details = {"finish_reason": "abort"} if self.output is None else dataclasses.asdict(self.output)
        for derived in ("prompt_tokens", "text", "tokens", "ttft", "tpot"):
            details.pop(derived, None)
        return {"text": self.text, "tokens": self.tokens, **details, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        new = len(self.tokens)
        return {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": new,
            "ttft_seconds": self.first - self.started if new else None,
            "tpot_seconds": (self.last - self.first) / (new - 1) if new > 1 else None,
            "tokens_per_second": new / (self.last - self.started) if new else None,
        }

    def print_summary(self, compile_seconds: float | None) -> None:
        usage = self._usage()
        parts = [f"{usage['prompt_tokens']} prompt tokens", f"{usage['new_tokens']} new tokens"]
        if usage["ttft_seconds"] is not None:
            parts.append(f"TTFT {usage['ttft_seconds'] * 1e3:.1f} ms")
        if usage["tpot_seconds"] is not None:
            parts.append(f"TPOT {usage['tpot_seconds'] * 1e3:.2f} ms")
        if usage["tokens_per_second"] is not None:
            parts.append(f"{usage['tokens_per_second']:.0f} tokens/s")
        if compile_seconds is not None:
            parts.append(f"compiled in {compile_seconds:.1f} s before")
        if self.output is None:
            parts.append("interrupted")
        _terminal(stderr=True).print(", ".join(parts), style="dim", markup=False, highlight=False, soft_wrap=True)


def _prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.file is None):
        raise UsageError("give a PROMPT, - for standard input, or --file FILE: one of them")
    try:
        if args.file is not None:
            return args.file.read_text(encoding="utf-8")
        return sys.stdin.read() if args.prompt == "-" else args.prompt
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt is not UTF-8 text: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read the prompt: {error}") from None


def _load(args: argparse.Namespace) -> tuple["Model", "SamplingParams"]:
    _cache_compilations()
    with _usage_errors():
        from .decode.sampling_params import SamplingParams

        names = {field.name for field in dataclasses.fields(SamplingParams)} & vars(args).keys()
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if "logit_bias" in given:
            given["logit_bias"] = dict(given["logit_bias"])
        SamplingParams(**given)  # refused before a model is loaded
    from .decode.generate import default_sampling
    from .model.loading import load_model

    model = load_model(args.model, dtype=args.dtype)
    return model, default_sampling(model, **given)


def _cache_compilations() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place for them already."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "ridgeline" / "jax"))


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def _warm_up(model: "Model", prompt: Any, params: "SamplingParams") -> float:
    """Compile what the request will run, and say for how long."""
    from .decode.generate import warm_up

    started = time.perf_counter()
    with _terminal(stderr=True).status("compiling"):  # shown on terminals only
        warm_up(model, prompt, params)
    return time.perf_counter() - started


def _shapes(tokens: int, params: "SamplingParams") -> tuple[int, int]:
    """What programs for a prompt of so many tokens depend on."""
    from .decode import buckets

    return buckets.prefill_bucket(tokens), buckets.cache_bucket(tokens + (params.max_tokens or 0))


def _terminal(stderr: bool = False) -> "Console":
    from rich.console import Console

    return Console(stderr=stderr)
