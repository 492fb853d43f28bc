"""The `ridgeline` command: each command parses, calls the library, and prints."""

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, NoReturn

from .. import interrupts
from . import chat, compile, convert, eval, generate, plan
from .common import FAILURE, OK, USAGE, UsageError

EXAMPLES = """\
examples:
  ridgeline generate "Once upon a time"
  ridgeline generate --file prompt.txt --model path/to/hf-checkpoint --quantize int4 --kv-dtype int8
  ridgeline generate --file prompts.jsonl --max-tokens 100
  ridgeline chat --model path/to/hf-checkpoint
  ridgeline eval --text story.txt --quantize int4-32 --against float32
  ridgeline convert path/to/hf-checkpoint path/to/converted
  ridgeline plan llama-3.1-8b --hardware h100 --tensor 1,2 --batch 1,8,32
  ridgeline bench decode llama-3.2-1b --layers 4 --batch 1,8 --compare transformers
  ridgeline compile llama-3.1-8b --target h200 --devices 8
"""


def command() -> NoReturn:
    """The process of the command; it ends with `main`'s exit code."""
    code = interrupts.INTERRUPTED
    with interrupts.heeded(), contextlib.suppress(KeyboardInterrupt):  # a second one, while the first is told
        code = main()
    if code == interrupts.INTERRUPTED:
        _flush()
        os._exit(code)  # threads that still compile are not waited for
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      argv: arguments after the program's name; `sys.argv` by default.

    Returns:
      The exit code: 0 success, 1 a failure at run time, 2 bad usage, 130 ended by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    _take_any_text()
    try:
        args = _parser(argv).parse_args(argv)
    except SystemExit as exit:  # argparse has printed what was wrong, or the help
        return exit.code if isinstance(exit.code, int) else USAGE
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"ridgeline: {message}", file=sys.stderr)
            return args.run(args)
    except UsageError as error:
        return _fail(error, USAGE)
    except BrokenPipeError:  # whoever read the output has closed it, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except KeyboardInterrupt:
        print(interrupts.line(), file=sys.stderr)
        return interrupts.INTERRUPTED
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError, FloatingPointError) as error:
        return _fail(error, FAILURE)


def _flush() -> None:
    with contextlib.suppress(OSError):  # whoever read the output has gone, perhaps by the same Ctrl-C
        sys.stdout.flush()


def _take_any_text() -> None:
    """Bytes that are no text come in as halves of characters, which tokenizers refuse; what terminals lack is shown."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _fail(error: Exception, code: int) -> int:
    print(f"ridgeline: {error}", file=sys.stderr)
    return code


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ridgeline",
        description="Run language models with JAX. A small story-telling model is included; no download is needed.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ridgeline {version('ridgeline')}")
    shells = {"choices": ("bash", "zsh", "tcsh"), "metavar": "SHELL"}
    parser.add_argument("--completion", action=_Completion, **shells, help="print a script that completes commands")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for command in (generate, chat, eval, convert, plan, compile):
        command.add_parser(commands)
    bench = commands.add_parser("bench", help="measure this machine, and models and kernels on it")
    if argv[:1] == ["bench"]:  # measuring has a house of its own, which the other commands do not import
        from ..benchmarks import add_parsers

        add_parsers(bench, argv)
    return parser


class _Completion(argparse.Action):
    """Print what a shell completes commands by, and end."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, shell: str, *_: Any) -> NoReturn:
        try:
            import shtab  # late, and optional
        except ImportError:
            parser.error("--completion needs shtab: pip install 'ridgeline[completion]'")
        print(shtab.complete(_parser(["bench"]), shell))
        parser.exit()
