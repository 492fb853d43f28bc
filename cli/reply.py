"""One streamed completion on the command line."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from ..decode.request import RequestOutput, StreamChunk, TokenLogprobs
from ..interrupts import ctrl_c
from ..model.tokenizer import Tokenizer
from .common import terminal
from .formats import simple_table


class Reply:
    """Printed as it comes, kept for the summary, whole or cut short by Ctrl-C.

    Args:
      show: whether to print it.
      prompt_tokens: of the prompt.
      compile_seconds: that went before it, where it was measured.
      before: a text that is shown before it, when it comes.
    """

    def __init__(self, show: bool, prompt_tokens: int, compile_seconds: float | None, before: str = ""):
        self.show, self.prompt_tokens, self.compile_seconds = show, prompt_tokens, compile_seconds
        self.before = before
        self.cached_tokens: int | None = None  # of the prompt, found in the cache, where there was one before
        self.text, self.tokens, self.output = "", [], None
        self.started = self.first = self.last = time.perf_counter()

    def run(self, chunks: Iterator[StreamChunk]) -> None:
        """Take what is generated, until the end or Ctrl-C.

        Raises:
          Exception: what it failed with.
        """
        self.started = time.perf_counter()
        waiting = terminal(stderr=True).status("reading the prompt")  # shown on terminals only
        with ctrl_c() as pressed, contextlib.suppress(KeyboardInterrupt), waiting:
            for chunk in chunks:
                self.last = time.perf_counter()
                if not self.tokens:
                    self.first = self.last
                    waiting.stop()
                    self._show_before()
                self.text, self.output = self.text + chunk.text, chunk.output
                self.tokens += chunk.tokens
                if self.show:
                    print(chunk.text, end="", flush=True)
                if pressed.is_set():
                    break
        if self.output is not None and self.output.error is not None:
            raise self.output.error

    def _show_before(self) -> None:
        if self.show and self.before:
            terminal().print(self.before, end="", style="bold", markup=False, highlight=False, soft_wrap=True)

    def as_dict(self) -> dict[str, Any]:
        """The completion for JSON; an interrupted one has the finish reason "abort"."""
        details = {"finish_reason": "abort"} if self.output is None else as_json(self.output)
        return details | {"text": self.text, "tokens": self.tokens, "usage": self._usage()}

    def _usage(self) -> dict[str, Any]:
        new = len(self.tokens)
        ttft = self.first - self.started if new else None
        used = usage(self.prompt_tokens, new, ttft, (self.last - self.first) / (new - 1) if new > 1 else None)
        return used if self.cached_tokens is None else used | {"cached_tokens": self.cached_tokens}

    def print_summary(self) -> None:
        """One line on standard error: tokens, times, and compilation where it was measured."""
        used = self._usage() | {"compiled": self.compile_seconds}
        texts = {
            "prompt_tokens": "{} prompt tokens",
            "cached_tokens": "{} found in the cache",
            "new_tokens": "{} new tokens",
            "ttft_seconds": "TTFT {:.1f} ms",
            "tpot_seconds": "TPOT {:.2f} ms",
            "tokens_per_second": "{:.0f} tokens/s",
            "compiled": "compiled in {:.1f} s before",
        }
        scales = {"ttft_seconds": 1e3, "tpot_seconds": 1e3}
        parts = [text.format(used[k] * scales.get(k, 1)) for k, text in texts.items() if used.get(k) is not None]
        line = ", ".join(parts + ["interrupted"] * (self.output is None))
        terminal(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)

    def print_logprobs(self, tokenizer: Tokenizer) -> None:
        """A table of them, where they were asked for and the reply is whole."""
        if self.output is not None and self.output.logprobs is not None:
            terminal().print(logprobs_table(self.output.logprobs, tokenizer))


def logprobs_table(logprobs: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> Table:
    """Tokens with their natural log-probabilities and ranks, and the likeliest tokens there."""

    def text(token: int) -> str:
        return json.dumps(tokenizer.decode([token], skip_special_tokens=False), ensure_ascii=False)

    table = simple_table("", "token", "logprob", "rank", names=1)
    table.add_column("likeliest")
    for each in logprobs:
        likeliest = ", ".join(f"{text(token)} {value:.3f}" for token, value in each.top.items())
        table.add_row(Text(text(each.token)), f"{each.logprob:.3f}", str(each.rank), Text(likeliest))
    return table


def as_json(output: RequestOutput) -> dict[str, Any]:
    """One sample of a result for JSON; lengths and times are its "usage"."""
    details = dataclasses.asdict(dataclasses.replace(output, error=None, others=()))
    prompt, ttft, tpot, _ = (details.pop(name) for name in ("prompt_tokens", "ttft", "tpot", "others"))
    used = usage(len(prompt), len(output.tokens), ttft if output.tokens else None, tpot)
    return details | {"error": output.error and str(output.error), "usage": used}


def usage(prompt_tokens: int, new_tokens: int, ttft: float | None, tpot: float | None) -> dict[str, Any]:
    """Lengths and times of a request; `ttft` is None of one without tokens, and `tpot` of fewer than two."""
    seconds = None if ttft is None else ttft + (tpot or 0.0) * (new_tokens - 1)
    return {
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "ttft_seconds": ttft,
        "tpot_seconds": tpot,
        "tokens_per_second": new_tokens / seconds if seconds else None,
    }
