"""What requests are replayed against, in real time: an engine, and the same engine held to static batches."""

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from ..decode.engine.engine import Engine
from ..decode.sampling.params import SamplingParams
from .request_trace import TraceRequest
from .served import Served

GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)


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


def make_jobs(trace: Sequence[TraceRequest], vocab_size: int, seed: int) -> list[Job]:
    """Random tokens of a trace's lengths: those of a block are drawn by its id, so that equal ids are equal tokens."""
    rng = np.random.default_rng(seed)

    @functools.cache
    def block(index: int, tokens: int) -> list[int]:
        return np.random.default_rng([seed, index]).integers(vocab_size, size=tokens).tolist()

    def prompt(request: TraceRequest) -> tuple[int, ...]:
        if not request.blocks:
            return tuple(rng.integers(vocab_size, size=request.prompt_tokens).tolist())
        tokens = [token for index in request.blocks for token in block(index, request.block_tokens)]
        return tuple(tokens[: request.prompt_tokens])

    return [Job(request.arrival, prompt(request), request.output_tokens) for request in trace]


def on_engine(
    engine: Engine,
    jobs: Sequence[Job],
    max_batch: int | None = None,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    max_concurrency: int | None = None,
) -> Iterator[tuple[int, list[float]]]:
    """`Serve` on an engine that has no requests.

    Args:
      engine: on which jobs run.
      jobs: to serve.
      max_batch: None submits each job when it arrives. A number makes static batches: what has arrived, at most so
        many, is submitted together, and nothing else before all of it is done.
      clock, sleep: of real time.
      max_concurrency: most requests that are with the engine; others are held back, and their time runs.
    """
    start, submitted, done, times = clock(), 0, 0, [[] for _ in jobs]
    job_of: dict[int, int] = {}  # by the engine's number
    at_once = len(jobs) if max_concurrency is None else max_concurrency
    while submitted < len(jobs) or engine.has_work:
        if max_batch is None or not engine.has_work:
            now, most = clock() - start, len(jobs) if max_batch is None else submitted + max_batch
            while submitted < min(most, len(jobs), done + at_once) and jobs[submitted].arrival <= now:
                job = jobs[submitted]
                number = engine.submit(job.prompt, dataclasses.replace(GREEDY, max_tokens=job.output_tokens))
                job_of[number], submitted = submitted, submitted + 1
        if not engine.has_work:
            sleep(jobs[submitted].arrival - now)
        for chunk in engine.step() if engine.has_work else ():
            job = job_of[chunk.index]
            times[job] += [clock() - start] * len(chunk.tokens)
            if chunk.output is not None:
                if chunk.output.error is not None:
                    raise chunk.output.error
                done += 1
                yield job, times[job]


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
        served[index] = Served(job.arrival, times, len(job.prompt))
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
