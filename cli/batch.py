"""`ridgeline generate --file prompts.jsonl`, or with `--n`: many texts, through one engine."""

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.text import Text

from ..decode.engine.engine import Engine
from ..decode.generate import engine_for
from ..decode.prompts import Prompt, make_request
from ..decode.request import Request, RequestOutput
from ..decode.sampling.params import SamplingParams
from ..interrupts import INTERRUPTED, ctrl_c
from ..model.loading import Model
from .common import FAILURE, OK, UsageError, drafter_for, load, read_text, terminal, usage_errors
from .formats import duration, number, percent, print_json
from .reply import as_json, logprobs_table

MAX_BATCH = 32
_REFRESH = 0.2  # seconds between two states of the line
_FIELDS = tuple(field.name for field in dataclasses.fields(SamplingParams))


@dataclasses.dataclass(frozen=True)
class Line:
    """A prompt.

    Attributes:
      where: file and line, for errors.
      prompt: a text, token ids, or the messages of a chat.
      sampling: fields of `SamplingParams` that it has of its own.
    """

    where: str
    prompt: Prompt
    sampling: dict[str, Any]


def run(args: argparse.Namespace, lines: Sequence[Line], as_texts: bool) -> int:
    """Print a result a prompt, in their order: JSON as soon as it is there, texts in the end; Ctrl-C leaves what there
    is."""
    model, params = load(args)
    requests = make_requests(model, lines, params)
    drafter = drafter_for(model, args)
    results: list[RequestOutput] = []
    with usage_errors():
        engine = engine_for(model, requests, MAX_BATCH, args.kv_dtype, drafter)
        for request in requests:
            engine.add(request)
    with engine:
        for line, output in zip(lines, in_order(finished(engine, len(requests))), strict=True):
            results.append(output)
            if not as_texts:
                _print_json(line.prompt, output)
    for line, output in zip(lines, results, strict=True) if as_texts else ():
        for sample in output.samples:
            _print_text(line.prompt, sample)
            if sample.logprobs is not None:
                terminal().print(logprobs_table(sample.logprobs, model.tokenizer))
    samples = [sample for output in results for sample in output.samples]
    if any(sample.error is not None for sample in samples):
        return FAILURE
    return INTERRUPTED if any(sample.finish_reason == "abort" for sample in samples) else OK


def _print_json(prompt: Prompt, output: RequestOutput) -> None:
    """A line: an object, or with several samples a list of them."""
    samples = [{"prompt": prompt, **as_json(sample)} for sample in output.samples]
    print_json(samples if output.others else samples[0])


def read_lines(file: Path) -> list[Line]:
    """The prompts of a file, one JSON value a line; empty lines are none.

    Raises:
      UsageError: naming file and line, for what is neither a text nor an object with "prompt" or "messages", and
        perhaps fields of `SamplingParams`.
    """
    lines = []
    for count, text in enumerate(read_text("--file", file).split("\n"), 1):
        if text.strip():
            where = f"{file.name}, line {count}"
            try:
                lines.append(_line(where, json.loads(text)))
            except json.JSONDecodeError as error:
                raise UsageError(f"{where} is no JSON: {error}; write a text in quotes, or an object") from None
            except (TypeError, ValueError) as error:
                raise UsageError(f"{where}: {error}") from None
    if not lines:
        raise UsageError(f"--file {file} has no prompts; give one a line")
    return lines


def _line(where: str, value: Any) -> Line:
    if isinstance(value, str):
        return Line(where, value, {})
    if not isinstance(value, dict) or len(value.keys() & {"prompt", "messages"}) != 1:
        raise ValueError('it must be a text in quotes, or an object with "prompt" or "messages"')
    prompt = value.get("prompt", value.get("messages"))
    if "messages" in value:
        if not prompt or not isinstance(prompt, list) or not all(map(_is_message, prompt)):
            raise ValueError('"messages" must be a list of objects with "role" and "content", one at least')
    elif not isinstance(prompt, str) and not (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        raise ValueError('"prompt" must be a text, or a list of token ids')
    sampling = {name: field for name, field in value.items() if name not in ("prompt", "messages")}
    for name in sampling:
        if name not in _FIELDS:
            raise ValueError(f"there is no field {name!r}; besides prompt or messages there are {', '.join(_FIELDS)}")
    if isinstance(sampling.get("logit_bias"), dict):  # JSON has no other keys than texts
        sampling["logit_bias"] = {int(token): bias for token, bias in sampling["logit_bias"].items()}
    SamplingParams(**sampling)  # refused before a model is loaded
    return Line(where, prompt, sampling)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and {"role", "content"} <= value.keys()


def make_requests(model: Model, lines: Sequence[Line], params: SamplingParams) -> list[Request]:
    """Checked and tokenized, each with its own sampling where it has any.

    Raises:
      UsageError: naming file and line, for what `generate` refuses.
    """
    requests = []
    for index, line in enumerate(lines):
        try:
            own = dataclasses.replace(params, **line.sampling)
            requests.append(make_request(model, index, line.prompt, own))
        except (TypeError, ValueError) as error:
            raise UsageError(f"{line.where}: {error}") from None
    return requests


def finished(engine: Engine, count: int) -> Iterator[tuple[int, RequestOutput]]:
    """Each of so many requests as it ends; Ctrl-C ends them all, with what they have. On terminals a line tells."""
    console, started, shown = terminal(stderr=True), time.perf_counter(), 0.0
    live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False, redirect_stderr=False)
    with ctrl_c() as pressed, live if console.is_terminal else contextlib.nullcontext():
        live.update(Text("compiling"), refresh=console.is_terminal)
        while engine.has_work:
            for index in range(count) if pressed.is_set() else ():
                engine.abort(index)
            for chunk in engine.step():
                if chunk.output is not None:
                    yield chunk.index, chunk.output
            if console.is_terminal and time.perf_counter() - shown > _REFRESH:
                shown = time.perf_counter()
                live.update(Text(state(engine, shown - started)), refresh=True)
    console.print(state(engine, time.perf_counter() - started), style="dim", highlight=False, soft_wrap=True)


def state(engine: Engine, seconds: float) -> str:
    """An engine in a line, so many seconds after it began."""
    stats = engine.stats()
    parts = [
        f"{stats.finished} finished",
        f"{stats.running} running",
        f"{stats.waiting} waiting",
        f"{number(stats.generated_tokens / seconds)} tokens/s",
    ]
    if stats.prefix_hit_rate is not None:
        parts.append(f"prefix hits {percent(stats.prefix_hit_rate)}")
    if stats.ttft is not None:
        parts.append(f"TTFT p50 {duration(stats.ttft[50])}")
    return ", ".join(parts)


def in_order(outputs: Iterable[tuple[int, RequestOutput]]) -> Iterator[RequestOutput]:
    """Outputs by their index from 0 on, each as soon as those before it are there."""
    early: dict[int, RequestOutput] = {}
    following = 0
    for index, output in outputs:
        early[index] = output
        while following in early:
            yield early.pop(following)
            following += 1


def _print_text(prompt: Prompt, output: RequestOutput) -> None:
    asked = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
    console, look = terminal(), {"markup": False, "highlight": False, "soft_wrap": True}
    if sys.stdout.isatty():
        console.print(asked, end="", style="bold", **look)
    console.print(f"{output.text}\n" if output.error is None else f"\nfailed: {output.error}\n", **look)
