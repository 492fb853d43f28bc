"""What the commands share: exit codes, the model and sampling options, loading, and the terminal."""

import argparse
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import jax
from rich.console import Console

from ..decode.prompts import default_sampling
from ..decode.sampling.params import SamplingParams
from ..decode.speculation.draft_model import ModelDrafter
from ..decode.speculation.drafter import Drafter
from ..decode.speculation.eagle import EagleDrafter, is_eagle
from ..decode.speculation.ngram import NGramDrafter
from ..model.config import DTYPES
from ..model.kv_specs import KV_DTYPES
from ..model.loading import Model, load_model, open_model
from ..model.schemes import SCHEMES
from ..sharding.mesh import make_mesh

OK, FAILURE, USAGE = 0, 1, 2


class UsageError(Exception):
    """What the user asked for cannot be done as asked; the message says what to change."""


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn what the library refuses into bad usage, where its arguments are the user's own."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from None


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """ValueError for an option of whole numbers, one or a list, that has one below 1."""
    for name in names:
        values = getattr(args, name)
        for value in values if isinstance(values, list) else [values]:
            if value < 1:
                raise ValueError(f"--{name} is {value}; it must be at least 1")


def print_notes(notes: Iterable[str]) -> None:
    """What the reader of a table has to know, below it."""
    for note in notes:
        terminal().print(note, style="dim", highlight=False, soft_wrap=True)


def add_options(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    """Add the options of model, sampling and output; those of sampling have `SamplingParams`' names."""
    model = parser.add_argument_group("model")
    add = model.add_argument
    help = "a Hugging Face checkpoint directory or Hub name, or 'bundled' for the included model (default)"
    add("--model", default="bundled", metavar="DIR", help=help)
    add_format_options(model)
    help = (
        "guess tokens ahead, which changes none: 'ngram', from the text itself; 'bundled-draft' or a directory, "
        "a model or an EAGLE-3 head"
    )
    add("--draft", metavar="DIR", help=help)
    add("--draft-tokens", type=int, default=4, metavar="N", help="tokens guessed at once (default: %(default)s)")
    add("--tensor", type=int, default=1, metavar="N", help="devices that share every layer (default: 1)")
    add("--data", type=int, default=1, metavar="N", help="copies that share out the rows (default: 1)")

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
    add("--logprobs", type=int, metavar="N", help="report log-probabilities and the N likeliest tokens")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="print one JSON object instead of running text")


def add_format_options(parser: argparse._ActionsContainer, *, dtype: str | None = None, kv: bool = True) -> None:
    """Add the numbers that a model is held in: dtype, quantization, and where there is one the KV cache."""
    add, schemes = parser.add_argument, ", ".join(SCHEMES)
    own = dtype or "the model's own"
    add("--dtype", choices=DTYPES, default=dtype, help=f"of weights and activations (default: {own})")
    add("--quantize", choices=SCHEMES, metavar="SCHEME", help=f"store the layers' weights in fewer bits: {schemes}")
    add("--quantize-output", choices=SCHEMES, metavar="SCHEME", help="the output projection likewise")
    if kv:
        formats = ", ".join(KV_DTYPES)
        add("--kv-dtype", choices=KV_DTYPES, metavar="DTYPE", help=f"of cached keys and values: {formats}")


def schemes(args: argparse.Namespace) -> dict[str, str | None]:
    """How a model is to be quantized, as `load_model` takes it."""
    return {"quantize": args.quantize, "quantize_output": args.quantize_output}


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 42=-5") from None


def load(args: argparse.Namespace) -> tuple[Model, SamplingParams]:
    """The model and the sampling that the options of `add_options` ask for."""
    _, params, read = open_(args)
    return read(), params


def open_(args: argparse.Namespace) -> tuple[Model, SamplingParams, Callable[[], Model]]:
    """As `load`, but the model without its weights, and what reads them."""
    cache_compilations()
    with usage_errors():
        names = {field.name for field in dataclasses.fields(SamplingParams)} & vars(args).keys()
        given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
        if "logit_bias" in given:
            given["logit_bias"] = dict(given["logit_bias"])
        SamplingParams(**given)  # refused before a model is loaded
        mesh = None if args.tensor == args.data == 1 else make_mesh(data=args.data, tensor=args.tensor)
    model, read = open_model(args.model, mesh=mesh, dtype=args.dtype, **schemes(args))
    return model, default_sampling(model, **given), read


def drafter_for(model: Model, args: argparse.Namespace) -> Drafter | None:
    """What `--draft` asks for."""
    if args.draft is None:
        return None
    tokens, is_head, draft = args.draft_tokens, is_eagle(args.draft), None
    if args.draft != "ngram" and not is_head:
        draft = load_model(args.draft, mesh=model.mesh, dtype=args.dtype)
    with usage_errors():
        drafter = ModelDrafter(draft, tokens) if draft else NGramDrafter(tokens)
        drafter = EagleDrafter(args.draft, tokens) if is_head else drafter
        drafter.bind(model)  # refused before anything is compiled
    return drafter


def read_text(option: str, file: Path) -> str:
    """What an option's file holds."""
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{option} {file} is not UTF-8: {error}; convert it, with iconv for one") from None
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be read: {error.strerror}; name a text file") from None
    if not text:
        raise UsageError(f"{option} {file} is empty; name a file with some text in it")
    return text


def cache_compilations() -> None:
    """Keep compiled programs between runs, unless the user has chosen a place for them already."""
    if jax.config.jax_compilation_cache_dir is None:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(base / "ridgeline" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def terminal(stderr: bool = False) -> Console:
    """Where text for people goes."""
    return Console(stderr=stderr)
