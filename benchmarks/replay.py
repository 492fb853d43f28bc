"""What users of a server would see: a trace of requests is replayed against it, each request at its own time.

The clock is real. A request's time to first token (TTFT) runs from its arrival, so that waiting counts; the time per
output token (TPOT) is the mean gap between its later tokens; its end-to-end time runs from arrival to last token.
Tokens count from when they reach the host, which gets them a block of decode steps at a time.

Goodput counts only the requests that meet limits on both (Zhong et al., "DistServe: Disaggregating Prefill and Decoding
for Goodput-optimized Large Language Model Serving", OSDI 2024), as a share and a second. The paper calls goodput the
highest rate at which a wanted share is met: to find it, replay at several values of `--speed`.

Prompts are random tokens of the trace's lengths and outputs have exactly its lengths, whatever the model says. Without
a trace, requests are generated as `request_trace.py` tells. The requests that have arrived run as a batch, and those
that arrive meanwhile wait until it is done.

    ridgeline bench replay --requests 40 --scale-lengths 0.2
    ridgeline bench replay --trace AzureLLMInferenceTrace_conv.csv --requests 200 --speed 0.5
    ridgeline bench replay --fit AzureLLMInferenceTrace_conv.csv
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..cli.common import add_format_options, terminal, usage_errors
from ..decode import buckets
from ..decode.generate import stream, warm_up
from ..decode.sampling.params import SamplingParams
from ..model.loading import Model
from ..roofline.plot import new_figure
from . import subject as subjects
from .harness import Table
from .limits import Figure
from .request_trace import CONVERSATION, TraceRequest, clamp, generate_trace, read_trace, scale
from .timing import elapsed
from .trace_fit import comparison, fit_workload

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True)
class Job:
    """A request as a server takes it: seconds after serving begins, before which it must not be touched; token ids; and
    how many tokens to generate, neither more nor fewer.
    """

    arrival: float
    prompt: tuple[int, ...]
    output_tokens: int


Serve = Callable[[Sequence[Job]], Iterator[tuple[int, list[float]]]]
"""What a trace is replayed against: serves jobs, in order of arrival, in real time; time 0 is when the first result is
asked for. For each job as it is done it yields the index, and when each of its tokens reached the host, in seconds."""


@dataclasses.dataclass(frozen=True)
class InOrder:
    """Runs what has arrived as one batch, in order of arrival; the next batch begins when all of it is done.

    Attributes:
      model, kv_dtype: as `generate` takes them.
      max_batch: most requests of a batch.
      clock, sleep: of real time.
    """

    model: Model
    max_batch: int
    kv_dtype: str | None = None
    clock: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep

    def warm_up(self, jobs: Sequence[Job]) -> None:
        """Compiles the programs of every batch that can come about, which depends on how fast earlier ones run."""
        for batch in tqdm(representatives(jobs, self.max_batch), unit="shape", desc="warm-up", leave=False):
            warm_up(self.model, *_arguments(batch), max_batch_size=len(batch), kv_dtype=self.kv_dtype)

    def serve(self, jobs: Sequence[Job]) -> Iterator[tuple[int, list[float]]]:
        start, done = self.clock(), 0
        while done < len(jobs):
            now = self.clock() - start
            if jobs[done].arrival > now:
                self.sleep(jobs[done].arrival - now)
                continue
            batch = [job for job in jobs[done : done + self.max_batch] if job.arrival <= now]
            times: list[list[float]] = [[] for _ in batch]
            chunks = stream(self.model, *_arguments(batch), max_batch_size=len(batch), kv_dtype=self.kv_dtype)
            for chunk in chunks:
                times[chunk.index] += [self.clock() - start] * len(chunk.tokens)
                if chunk.output is not None:
                    yield done + chunk.index, times[chunk.index]
            done += len(batch)


def _arguments(batch: Sequence[Job]) -> tuple[list[tuple[int, ...]], list[SamplingParams]]:
    params = [SamplingParams(max_tokens=job.output_tokens, temperature=0.0, ignore_eos=True) for job in batch]
    return [job.prompt for job in batch], params


def representatives(jobs: Sequence[Job], max_batch: int) -> list[Sequence[Job]]:
    """Batches of neighbors that together need every shape any batch of up to `max_batch` neighbors would."""
    known: set[tuple[int, int, int, bool]] = set()
    batches = []
    for first in range(len(jobs)):
        longest = total = 0
        for end in range(first + 1, min(first + max_batch, len(jobs)) + 1):
            job = jobs[end - 1]
            longest, total = max(longest, len(job.prompt)), max(total, len(job.prompt) + job.output_tokens)
            rows, cache = buckets.batch_bucket(end - first), buckets.cache_bucket(total)
            starts = {0, (longest - 1) // buckets.PREFILL_CHUNK * buckets.PREFILL_CHUNK}  # of first and last chunk
            needed = {(rows, cache, buckets.prefill_bucket(longest - start), start > 0) for start in starts}
            if not needed <= known:
                known |= needed
                batches.append(jobs[first:end])
    return batches


def make_jobs(trace: Sequence[TraceRequest], vocab_size: int, seed: int) -> list[Job]:
    rng = np.random.default_rng(seed)
    prompts = (tuple(rng.integers(vocab_size, size=request.prompt_tokens).tolist()) for request in trace)
    return [Job(each.arrival, prompt, each.output_tokens) for each, prompt in zip(trace, prompts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Served:
    """A request that was served: when it arrived and each of its tokens came, in seconds on one clock; one at least."""

    arrival: float
    times: Sequence[float]

    @property
    def ttft(self) -> float:
        """Seconds from arrival to first token."""
        return self.times[0] - self.arrival

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None for a single token."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1) if len(self.times) > 1 else None

    @property
    def end_to_end(self) -> float:
        """Seconds from arrival to last token."""
        return self.times[-1] - self.arrival

    def meets(self, ttft_limit: float, tpot_limit: float) -> bool:
        """Whether neither limit, in seconds, is exceeded; a single token has no TPOT to exceed one."""
        return self.ttft <= ttft_limit and (self.tpot is None or self.tpot <= tpot_limit)


def percentiles(values: Sequence[int | float]) -> dict[str, float] | None:
    """`PERCENTILES`, interpolated linearly between values; None of nothing."""
    if not values:
        return None
    return {f"p{percent}": float(np.percentile(values, percent)) for percent in PERCENTILES}


def summarize(served: Sequence[Served], ttft_limit: float, tpot_limit: float) -> dict[str, Any]:
    """All figures of a replay, in seconds and per second, over the time from first arrival to last token."""
    seconds = max(each.times[-1] for each in served) - min(each.arrival for each in served)
    good = sum(each.meets(ttft_limit, tpot_limit) for each in served)
    return {
        "requests": len(served),
        "seconds": seconds,
        "ttft": percentiles([each.ttft for each in served]),
        "tpot": percentiles([each.tpot for each in served if each.tpot is not None]),
        "end_to_end": percentiles([each.end_to_end for each in served]),
        "requests_per_s": len(served) / seconds,
        "output_tokens_per_s": sum(len(each.times) for each in served) / seconds,
        "limits": {"ttft": ttft_limit, "tpot": tpot_limit},
        "goodput": {"share": good / len(served), "requests_per_s": good / seconds},
    }


def replay(serve: Serve, jobs: Sequence[Job]) -> list[Served]:
    """Serves the jobs and returns what came, in their order.

    Raises:
      RuntimeError: the server left a job out, gave it other than the tokens asked for, or served it before it arrived.
    """
    served: dict[int, Served] = {}
    for index, times in tqdm(serve(jobs), total=len(jobs), unit="request", file=sys.stderr):
        job = jobs[index]
        if len(times) != job.output_tokens or times[0] < job.arrival:
            raise RuntimeError(
                f"request {index} arrives at {job.arrival:.3f} s and asks for {job.output_tokens} tokens; the server "
                f"gave {len(times)}, the first at {times[0] if times else math.nan:.3f} s: the server is wrong"
            )
        served[index] = Served(job.arrival, times)
    if len(served) != len(jobs):
        raise RuntimeError(f"the server finished {len(served)} of {len(jobs)} requests; every one must be served")
    return [served[index] for index in range(len(jobs))]


@contextlib.contextmanager
def counted_compilations() -> Iterator[Callable[[], int]]:
    """Counts the programs that XLA compiles, or fetches compiled, within."""
    durations = []

    def listen(event: str, duration: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield lambda: len(durations)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def positive(kind: Callable[[str], Any], text: str) -> Any:
    """A number from the command line, above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := kind(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'number' if kind is float else 'integer'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole, real = functools.partial(positive, int), functools.partial(positive, float)
    subjects.add_arguments(parser, default="bundled")
    add_format_options(parser)
    add = parser.add_argument
    add("--max-batch", type=whole, default=8, metavar="B", help="most requests of a batch (default: %(default)s)")
    add = parser.add_argument_group("requests").add_argument
    add("--trace", type=Path, metavar="FILE", help="a CSV with TIMESTAMP, ContextTokens and GeneratedTokens")
    add("--requests", type=whole, metavar="N", help="the first N of the trace (default: all), or N generated (100)")
    add("--rate", type=real, metavar="R", help=f"generated requests a second (default: {CONVERSATION.rate})")
    add("--seed", type=int, default=0, metavar="S", help="of generated requests and of prompts (default: 0)")
    add("--speed", type=real, default=1.0, metavar="X", help="replay X times as fast (default: 1)")
    add("--scale-lengths", type=real, default=1.0, metavar="X", help="lengths of prompts and outputs, times X (1)")
    add("--fit", type=Path, metavar="FILE", help="fit the generator to a trace, print how well it does, and stop")
    add = parser.add_argument_group("limits, for goodput").add_argument
    add("--ttft-limit", type=real, default=1.0, metavar="SECONDS", help="(default: %(default)s)")
    add("--tpot-limit", type=real, default=0.1, metavar="SECONDS", help="(default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.fit is not None:
        return print_fit(args.fit)
    with usage_errors():
        if args.trace is not None and args.rate is not None:
            raise ValueError("--rate is for generated requests; change a trace's with --speed")
        if args.trace is not None:
            trace = read_trace(args.trace)[: args.requests]
        else:
            trace = generate_trace(args.requests or 100, args.seed, CONVERSATION, args.rate)
        schemes = args.dtype, args.quantize, args.quantize_output
        subject = subjects.find_subject(args.model, args.layers, args.set, *schemes)
    trace = scale(trace, lengths=args.scale_lengths, speed=args.speed)
    trace, clamped = clamp(trace, subject.config.max_position)
    server = InOrder(subjects.make_model(subject), args.max_batch, args.kv_dtype)
    jobs = make_jobs(trace, subject.config.vocab_size, args.seed)
    warm_up_seconds, _ = elapsed(lambda: server.warm_up(jobs))
    with counted_compilations() as compilations:
        served = replay(server.serve, jobs)
    span = trace[-1].arrival
    yield {
        "subject": subject.title,
        "model": subject.record | {"kv": args.kv_dtype},
        "server": {"kind": "batches in order of arrival", "max_batch": args.max_batch},
        "trace": {
            "source": "generated" if args.trace is None else args.trace.name,
            "requests": len(trace),
            "requests_per_s": (len(trace) - 1) / span if span else None,
            "clamped": clamped,
            "max_position": subject.config.max_position,
            "prompt_tokens": percentiles([request.prompt_tokens for request in trace]),
            "output_tokens": percentiles([request.output_tokens for request in trace]),
        },
        "warm_up_seconds": round(warm_up_seconds, 3),
        "compiled_while_serving": compilations(),
        "result": summarize(served, args.ttft_limit, args.tpot_limit),
        "ttft": [each.ttft for each in served],
        "tpot": [each.tpot for each in served if each.tpot is not None],
    }


def print_fit(file: Path) -> None:
    """The workload fitted to a trace, and the trace beside what is generated after that and after what ships."""
    with usage_errors():
        real = read_trace(file)
        fitted = fit_workload(real)
    terminal().print(fitted)
    for title, workload in (("fitted to this trace", fitted), ("as it ships", CONVERSATION)):
        comparison(f"generator {title}: {len(real)} requests, seed 0", real, workload).print()


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """Percentiles of the latencies, then what passed and was good."""
    result, trace, goodput = report["result"], report["trace"], report["result"]["goodput"]
    rows = []
    for name, key in (("TTFT", "ttft"), ("TPOT", "tpot"), ("end to end", "end_to_end")):
        cells = ["-"] * len(PERCENTILES) if result[key] is None else [f"{1e3 * v:.1f}" for v in result[key].values()]
        rows.append((name, *cells, f"{1e3 * result['limits'][key]:.0f}" if key in result["limits"] else ""))
    yield Table("milliseconds", ("", *(f"p{percent}" for percent in PERCENTILES), "limit"), rows)
    rate = f", {trace['requests_per_s']:.2f} a second" if trace["requests_per_s"] else ""
    yield (
        f"{trace['requests']} requests{rate}; {trace['clamped']} cut to the {trace['max_position']} positions of "
        f"{report['subject']}. {result['seconds']:.1f} s: {result['requests_per_s']:.2f} requests/s, "
        f"{result['output_tokens_per_s']:.1f} output tokens/s; goodput {goodput['requests_per_s']:.2f} requests/s, "
        f"{goodput['share']:.1%} within both limits."
    )
    if report["compiled_while_serving"]:
        count = report["compiled_while_serving"]
        yield f"{count} programs were compiled while the clock ran: THE TIMES ARE TOO LONG."


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The slowest of a hundred requests beside the limits of goodput."""
    result = report["result"]
    for key, limit in result["limits"].items():
        if result[key] is not None:
            yield Figure(f"{key.upper()}, p99", result[key]["p99"] * 1e3, limit * 1e3, "ms")


def plot(report: Mapping[str, Any], path: Path) -> None:
    """The share of requests whose TTFT, and whose TPOT, is at most so long, with the limits."""
    figure = new_figure(figsize=(9, 3.6))
    for axes, (key, limit) in zip(figure.subplots(1, 2, sharey=True), report["result"]["limits"].items(), strict=True):
        if report[key]:
            axes.ecdf([1e3 * value for value in report[key]], label=f"{len(report[key])} requests")
        axes.axvline(1e3 * limit, color="tab:red", linestyle="--", label=f"limit, {1e3 * limit:g} ms")
        axes.set(xlabel=f"{key.upper()} (ms)", xlim=(0, None), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(loc="lower right")
    figure.axes[0].set_ylabel("share of requests")
    figure.savefig(path, dpi=150)
