"""What users of a server would see: a trace of requests is replayed against it, each request at its own time.

The clock is real. A request's time to first token (TTFT) runs from its arrival, so that waiting counts; the time per
output token (TPOT) is the mean gap between its later tokens; its end-to-end time runs from arrival to last token.
Tokens count from when they reach the host, which gets them a block of decode steps at a time.

Results have the names and units of `vllm bench serve`. Goodput counts only the requests that meet limits on both (Zhong
et al., "DistServe: Disaggregating Prefill and Decoding for Goodput-optimized Large Language Model Serving", OSDI 2024),
as a share and a second. The paper calls goodput the highest rate at which a wanted share is met: to find it, replay at
several values of `--speed`.

Two servers take turns: "engine", to which each request is submitted when it arrives, and "static", the same engine
held to batches: those that have arrived run together, and those that arrive meanwhile wait until all of them are done;
nothing is shared. Outputs have exactly the trace's lengths, whatever the model says. Prompts are random tokens of the
trace's lengths; where it says what they share (Mooncake's `hash_ids`), they share it. Without a trace, requests are
generated as `request_trace.py` tells or, with --conversations, as `conversations.py` does.

    ridgeline bench replay --requests 40 --scale-lengths 0.2
    ridgeline bench replay --trace AzureLLMInferenceTrace_conv.csv --requests 200 --speed 0.5,1,2 --plot goodput.png
    ridgeline bench replay --conversations --scale-lengths 0.1 --server engine --cache-tokens 1024,4096,16384
    ridgeline bench replay --conversations --requests 500 --save-trace conversations.jsonl
    ridgeline bench replay --fit AzureLLMInferenceTrace_conv.csv
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli.common import add_format_options, terminal, usage_errors
from ..decode import buckets
from ..decode.engine.engine import Engine
from ..decode.engine.sizes import PAGE_SIZE
from ..model.loading import Model
from . import subject as subjects
from .conversations import Conversations, generate_conversations
from .harness import Table
from .limits import Figure
from .replay_plot import plot
from .request_trace import CONVERSATION, TraceRequest, clamp, generate_trace, scale
from .served import LATENCIES, allowed_hit_rate, percentiles, summarize
from .servers import GREEDY, Job, counted_compilations, make_jobs, on_engine, replay
from .timing import elapsed
from .trace_files import read_trace, write_trace
from .trace_fit import comparison, fit_workload

__all__ = ["add_arguments", "figures", "measure", "plot", "show"]

SERVERS = ("static", "engine")


def positive(kind: Callable[[str], Any], text: str) -> Any:
    """A number from the command line, above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (value := kind(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'number' if kind is float else 'integer'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole, real = functools.partial(positive, int), functools.partial(positive, float)

    def several(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: list(dict.fromkeys(map(kind, text.split(","))))

    subjects.add_arguments(parser, default="bundled")
    add_format_options(parser)
    add = parser.add_argument_group("server").add_argument
    add("--server", choices=(*SERVERS, "both"), default="both", help="what it is replayed against (default: both)")
    add("--max-batch", type=whole, default=8, metavar="B", help="most requests that run together (default: 8)")
    help = "positions of the pool; the engine runs with each (default: all that rows at full length take)"
    add("--cache-tokens", type=several(whole), default=[None], metavar="N,...", help=help)
    add("--prefill-tokens", type=whole, default=2048, metavar="N", help="most tokens a step (default: %(default)s)")
    help = "let requests share no pages of equal beginnings"
    add("--no-prefix-caching", dest="prefix_caching", action="store_false", help=help)
    add = parser.add_argument_group("requests").add_argument
    add("--trace", type=Path, metavar="FILE", help="Azure's CSV, or Mooncake's form if it ends in .jsonl")
    add("--conversations", action="store_true", help="generate conversations of several turns over system prompts")
    add("--requests", type=whole, metavar="N", help="the first N of the trace (default: all), or N generated (100)")
    rates = f"{CONVERSATION.rate}, and {Conversations.rate} of conversations"
    add("--rate", type=real, metavar="R", help=f"generated requests a second (default: {rates})")
    add("--seed", type=int, default=0, metavar="S", help="of generated requests and of prompts (default: 0)")
    help = "replay X times as fast, one after the other (default: 1)"
    add("--speed", type=several(real), default=[1.0], metavar="X,...", help=help)
    add("--scale-lengths", type=real, default=1.0, metavar="X", help="lengths of prompts and outputs, times X (1)")
    help = "most requests with the server; others wait outside (default: any number)"
    add("--max-concurrency", type=whole, metavar="N", help=help)
    add("--num-warmups", type=int, default=0, metavar="N", help="requests served before the clock runs (default: 0)")
    help = "write the trace in Mooncake's form, as it is before it is scaled, and stop"
    add("--save-trace", type=Path, metavar="FILE", help=help)
    add("--fit", type=Path, metavar="FILE", help="fit the generator to a trace, print how well it does, and stop")
    add = parser.add_argument_group("limits, for goodput").add_argument
    add("--ttft-limit", type=real, default=1.0, metavar="SECONDS", help="(default: %(default)s)")
    add("--tpot-limit", type=real, default=0.1, metavar="SECONDS", help="(default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.fit is not None:
        return print_fit(args.fit)
    with usage_errors():
        trace = _trace(args)
        if args.save_trace is not None:
            return save(trace, args.save_trace)
        schemes = args.dtype, args.quantize, args.quantize_output
        subject = subjects.find_subject(args.model, args.layers, args.set, *schemes)
        trace = scale(trace, lengths=args.scale_lengths, speed=1.0)
        trace, clamped = clamp(trace, subject.config.max_position)
        longest = max(request.prompt_tokens + request.output_tokens for request in trace)
        _check_pools(args.cache_tokens, longest)
    model, span = subjects.make_model(subject), trace[-1].arrival
    jobs = make_jobs(trace, subject.config.vocab_size, args.seed)
    results = {
        "subject": subject.title,
        "model": subject.record | {"kv": args.kv_dtype},
        "server": {name: getattr(args, name) for name in ("max_batch", "prefill_tokens", "prefix_caching")},
        "trace": {
            "source": args.trace.name if args.trace else "conversations" if args.conversations else "generated",
            "requests": len(trace),
            "requests_per_s": (len(trace) - 1) / span if span else None,
            "clamped": clamped,
            "max_position": subject.config.max_position,
            "prompt_tokens": percentiles([request.prompt_tokens for request in trace]),
            "output_tokens": percentiles([request.output_tokens for request in trace]),
            "prefix_hit_rate": allowed_hit_rate((job.prompt for job in jobs), PAGE_SIZE),
        },
        "limits": {"ttft": args.ttft_limit, "tpot": args.tpot_limit},
        "runs": [],
    }
    for speed, (server, cache_tokens) in itertools.product(args.speed, _servers(args)):
        faster = [Job(job.arrival / speed, job.prompt, job.output_tokens) for job in jobs]
        run = {"server": server, "speed": speed, "cache_tokens": cache_tokens}
        results["runs"].append(run | _run(args, model, faster, server, cache_tokens, longest))
        yield results


def _trace(args: argparse.Namespace) -> list[TraceRequest]:
    """As it was read or generated, before it is scaled."""
    if args.trace is not None:
        if args.rate is not None or args.conversations:
            name = "--conversations" if args.conversations else "--rate"
            raise ValueError(f"{name} is for generated requests; change a trace's with --speed or --scale-lengths")
        return read_trace(args.trace)[: args.requests]
    if args.conversations:
        return generate_conversations(args.requests or 100, args.seed, Conversations(), args.rate)
    return generate_trace(args.requests or 100, args.seed, CONVERSATION, args.rate)


def _check_pools(pools: Sequence[int | None], longest: int) -> None:
    for tokens in pools:
        if tokens is not None and tokens // PAGE_SIZE * PAGE_SIZE < longest:
            raise ValueError(
                f"--cache-tokens is {tokens}, in pages of {PAGE_SIZE}, and the longest request takes {longest} "
                "positions; raise it, or lower --scale-lengths"
            )


def _servers(args: argparse.Namespace) -> list[tuple[str, int | None]]:
    """The servers of one speed, and the size of each one's pool: static batches find nothing in it, and have one."""
    pools = {"static": [max(args.cache_tokens)], "engine": args.cache_tokens}
    names = SERVERS if args.server == "both" else (args.server,)
    return [(name, tokens) for name in names for tokens in pools[name]]


def _run(
    args: argparse.Namespace, model: Model, jobs: Sequence[Job], server: str, cache_tokens: int | None, longest: int
) -> dict[str, Any]:
    """One replay on a new engine, of which nothing is compiled while the clock runs."""
    with Engine(
        model,
        max_batch_size=args.max_batch,
        cache_tokens=cache_tokens,
        max_length=buckets.cache_bucket(longest),
        prefill_tokens=args.prefill_tokens,
        prefix_caching=args.prefix_caching and server == "engine",
        kv_dtype=args.kv_dtype,
    ) as engine:
        warm_up_seconds, _ = elapsed(lambda: engine.warm_up(progress=True, sampling=[GREEDY]))
        batch = args.max_batch if server == "static" else None
        for job in jobs[: args.num_warmups]:  # of other tokens, so that nothing of the trace is found
            engine.submit(job.prompt[::-1], dataclasses.replace(GREEDY, max_tokens=job.output_tokens))
            list(engine.run())
        before = engine.stats()
        serve = functools.partial(on_engine, engine, max_batch=batch, max_concurrency=args.max_concurrency)
        with counted_compilations() as compilations:
            served = replay(serve, jobs)
        stats = engine.stats()
    found = stats.cached_prompt_tokens - before.cached_prompt_tokens
    return {
        "cache_tokens": engine.sizes.cache_tokens,
        "warm_up_seconds": round(warm_up_seconds, 3),
        "compiled_while_serving": compilations(),
        "result": summarize(served, args.ttft_limit, args.tpot_limit),
        "prefix_hit_rate": found / (stats.prompt_tokens - before.prompt_tokens),
        "preemptions": stats.preemptions - before.preemptions,
        "ttft": [each.ttft for each in served],
        "tpot": [each.tpot for each in served if each.tpot is not None],
    }


def save(trace: Sequence[TraceRequest], file: Path) -> None:
    """The trace in a file, which `--trace` reads."""
    if file.suffix != ".jsonl":
        raise ValueError(f"--save-trace is {str(file)!r}; end it in .jsonl, as what it holds is")
    write_trace(trace, file)
    terminal().print(f"{len(trace)} requests are in {file}.", highlight=False, soft_wrap=True)


def print_fit(file: Path) -> None:
    """The workload fitted to a trace, and the trace beside what is generated after that and after what ships."""
    with usage_errors():
        real = read_trace(file)
        fitted = fit_workload(real)
    terminal().print(fitted)
    for title, workload in (("fitted to this trace", fitted), ("as it ships", CONVERSATION)):
        comparison(f"generator {title}: {len(real)} requests, seed 0", real, workload).print()


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    """The servers side by side, a table a speed: latencies, then what passed, was good, and was found in the cache."""
    trace = report["trace"]
    for speed in dict.fromkeys(run["speed"] for run in report["runs"]):
        yield _table(speed, [run for run in report["runs"] if run["speed"] == speed])
    rate = f", {trace['requests_per_s']:.2f} a second at speed 1" if trace["requests_per_s"] else ""
    limits = " and ".join(f"{key.upper()} {1e3 * s:.0f} ms" for key, s in report["limits"].items())
    yield (
        f"{trace['requests']} requests{rate}; {trace['clamped']} cut to the {trace['max_position']} positions of "
        f"{report['subject']}. Good: within {limits}. An engine stands with the positions of its pool. Prefix hits: "
        f"prompt tokens found in it; a pool without end would have {trace['prefix_hit_rate']:.1%}."
    )
    for run in report["runs"]:
        if count := run["compiled_while_serving"]:
            yield f"{_name(run)}: {count} programs were compiled while the clock ran: THE TIMES ARE TOO LONG."


def _name(run: Mapping[str, Any]) -> str:
    return f"{run['server']}, {run['cache_tokens']:,}" if run["server"] == "engine" else run["server"]


def _table(speed: float, runs: Sequence[Mapping[str, Any]]) -> Table:
    results = [run["result"] for run in runs]

    def row(name: str, key: str) -> tuple[str, ...]:
        return name, *("-" if result[key] is None else f"{result[key]:.2f}" for result in results)

    rows = [
        row("Benchmark duration (s)", "duration"),
        row("Request throughput (req/s)", "request_throughput"),
        row("Request goodput (req/s)", "request_goodput"),
        ("Good requests", *(f"{result['good_share']:.1%}" for result in results)),
        row("Output token throughput (tok/s)", "output_throughput"),
        row("Total token throughput (tok/s)", "total_token_throughput"),
        ("Most concurrent requests", *(str(result["max_concurrent_requests"]) for result in results)),
    ]
    for key, name in LATENCIES.items():
        for figure in ("Mean", "Median", "P90", "P99"):
            rows.append(row(f"{figure} {name} (ms)", f"{figure.lower()}_{key}_ms"))
    rows += [
        ("Prefix hits", *(f"{run['prefix_hit_rate']:.1%}" for run in runs)),
        ("Preemptions", *(str(run["preemptions"]) for run in runs)),
    ]
    return Table(f"speed {speed:g}", ("", *map(_name, runs)), rows)


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """The slowest of a hundred requests beside the limits of goodput."""
    for run, (key, limit) in itertools.product(report["runs"], report["limits"].items()):
        slowest = run["result"][f"p99_{key}_ms"]
        if slowest is not None:
            yield Figure(f"{_name(run)}, speed {run['speed']:g}: P99 {key.upper()}", slowest, limit * 1e3, "ms")
