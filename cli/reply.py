"""One streamed completion on the command line."""

import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..decode.generate import stream
from ..decode.prompts import make_requests
from ..decode.sampling.params import SamplingParams
from ..model.loading import Model
from .common import terminal, usage_errors


class Reply:
    """Printed as it comes, kept for the summary, whole or cut short by Ctrl-C."""

    def __init__(self, show: bool):
        self.show = show
        self.text, self.tokens, self.output = "", [], None
        self.started = self.first = self.last = time.perf_counter()
        self.prompt_tokens = 0
        self.compile_seconds: float | None = None

    def run(self, model: Model, prompt: Any, params: SamplingParams, kv_dtype: str | None) -> None:
        """Generate, until the end or Ctrl-C."""
        with usage_errors():
            self.prompt_tokens = len(make_requests(model, prompt, params)[0].prompt)
            chunks = stream(model, prompt, params, kv_dtype=kv_dtype)
        self.started = time.perf_counter()
        with _ctrl_c() as pressed, contextlib.suppress(KeyboardInterrupt):
            for chunk in chunks:
                self.last = time.perf_counter()
                self.first = self.last if not self.tokens else self.first
                self.text, self.output = self.text + chunk.text, chunk.output
                self.tokens += chunk.tokens
                if self.show:
                    print(chunk.text, end="", flush=True)
                if pressed.is_set():
                    break

    def as_dict(self) -> dict[str, Any]:
        """The completion for JSON; an interrupted one has the finish reason "abort"."""
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

    def print_summary(self) -> None:
        """One line on standard error: tokens, times, and compilation where it was measured."""
        usage = self._usage() | {"compiled": self.compile_seconds}
        texts = {
            "prompt_tokens": "{} prompt tokens",
            "new_tokens": "{} new tokens",
            "ttft_seconds": "TTFT {:.1f} ms",
            "tpot_seconds": "TPOT {:.2f} ms",
            "tokens_per_second": "{:.0f} tokens/s",
            "compiled": "compiled in {:.1f} s before",
        }
        scales = {"ttft_seconds": 1e3, "tpot_seconds": 1e3}
        parts = [text.format(usage[k] * scales.get(k, 1)) for k, text in texts.items() if usage[k] is not None]
        line = ", ".join(parts + ["interrupted"] * (self.output is None))
        terminal(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, so that it ends the work between two programs and not inside one; a second raises."""
    pressed = threading.Event()

    def handle(signum: int, frame: Any) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
