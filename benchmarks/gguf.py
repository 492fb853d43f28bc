"""A real model beside llama.cpp and OpenVINO GenAI on a CPU: the same weights, prompts and rows, in turns.

The peers read the model's GGUF file, Ridgeline its Hugging Face directory, in the formats that are asked for (named as
in `bench formats`). Each decodes `--tokens` greedy tokens after a prompt of `--prompt` tokens, of each row; prefill is
the time to the first of them. Peers that are not installed are left out and named:

    pip install llama-cpp-python openvino-genai
    ridgeline bench gguf path/to/directory --gguf model.gguf --formats bfloat16/int4-32+int8,bfloat16/int8+int8
"""

import argparse
import functools
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..cli.common import usage_errors
from ..cli.formats import integers, number
from ..decode.generate import stream, warm_up
from ..decode.sampling.params import SamplingParams
from ..model.loading import Model, load_model
from .environment import cores
from .formats import parse
from .harness import Table, milliseconds
from .limits import Figure, measured_roof, roof_record
from .quality import parameter_bytes
from .timing import Turn, in_turns, reason


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="DIR", help="a Hugging Face directory")
    add("--gguf", type=Path, required=True, metavar="FILE", help="the same weights in GGUF")
    formats = ["bfloat16/int4-32+int8", "bfloat16/int8+int8"]
    add("--formats", type=lambda text: text.split(","), default=formats, metavar="FORMAT,...")
    add("--rows", type=integers, default=[1, 8], metavar="B,...", help="(default: 1,8)")
    add("--prompt", type=int, default=512, metavar="N", help="tokens of each prompt (default: %(default)s)")
    add("--tokens", type=int, default=32, metavar="N", help="to decode (default: %(default)s)")
    add("--repeats", type=int, default=3, metavar="N", help="timings of each, in turns (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        formats = {name: parse(name) for name in args.formats}
        if not args.gguf.is_file():
            raise ValueError(f"--gguf {str(args.gguf)!r} is no file")
        if args.tokens < 2:
            raise ValueError(f"--tokens is {args.tokens}; it must be at least 2, for a time between them")
    before = measured_roof(["bfloat16"])
    models = {name: load_model(args.model, **format) for name, format in formats.items()}
    first = next(iter(models.values()))
    rng = np.random.default_rng(0)

    def prompts(rows: int) -> list[list[int]]:
        """New ones, of which no program has anything in a cache: of the half without special tokens."""
        return rng.integers(100, first.config.vocab_size // 2, (rows, args.prompt)).tolist()

    peers, out = _peers(args.gguf, args.prompt + args.tokens, max(args.rows))
    turns: dict[tuple[str, int], Turn] = {}
    for rows in args.rows:
        make = functools.partial(prompts, rows)
        for name, model in models.items():
            turns[name, rows] = _ours(model, make, args.tokens)
        for name, peer in peers.items():
            turns[name, rows] = _theirs(peer, make, args.tokens)
    timed, failures = in_turns(turns, args.repeats)
    sizes = {name: parameter_bytes(model.params) for name, model in models.items()}
    rows = [
        {
            "program": name,
            "rows": rows,
            "weight_bytes": sizes.get(name, args.gguf.stat().st_size),
            "prefill_tokens_per_s": rows * args.prompt / spreads["ttft"].min,
            "decode_tokens_per_s": rows / spreads["tpot"].min,
            "tpot": spreads["tpot"].runs,
            "ttft": spreads["ttft"].runs,
        }
        for (name, rows), spreads in timed.items()
    ]
    settings = {name: getattr(args, name) for name in ("prompt", "tokens", "repeats")}
    roof = roof_record(before, measured_roof(["bfloat16"]), "bfloat16")
    out |= {f"{name}, {rows} rows": why for (name, rows), why in failures.items()}
    yield {"subject": Path(args.model).name, **settings, "roof": roof, "rows": rows, "out": out}


def _peers(gguf: Path, length: int, rows: int) -> tuple[dict[str, Any], dict[str, str]]:
    """The peers that are installed and take the file, and why the others are out."""
    peers, out = {}, {}
    for name, (package, peer) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            out[name] = "not installed"
            continue
        try:
            peers[name] = peer(gguf, length, rows)
        except Exception as error:  # whatever another program raises is a result
            out[name] = reason(error)
    return peers, out


def _ours(model: Model, make: Callable[[], list[list[int]]], tokens: int) -> Turn:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    warm_up(model, make(), params)

    def turn() -> Mapping[str, float]:
        prompts, begun, made = make(), set(), 0
        started = first = last = time.perf_counter()
        for chunk in stream(model, prompts, params):
            last = time.perf_counter()
            if len(begun) == len(prompts):  # those that began sooner have made some of their tokens by then
                made += len(chunk.tokens)
            elif chunk.tokens:
                begun.add(chunk.index)
                first = last
        return {"ttft": first - started, "tpot": (last - first) / made * len(prompts)}

    return turn


def _theirs(peer: Any, make: Callable[[], list[list[int]]], tokens: int) -> Turn:
    def turn() -> Mapping[str, float]:
        ttft, tpot = peer.generate(make(), tokens)
        return {"ttft": ttft, "tpot": tpot}

    return turn


class LlamaCpp:
    """llama.cpp through llama-cpp-python, as many threads as XLA has."""

    def __init__(self, gguf: Path, length: int, rows: int):
        import llama_cpp

        self.api = api = llama_cpp
        api.llama_backend_init()
        model = api.llama_model_load_from_file(str(gguf).encode(), api.llama_model_default_params())
        if model is None:
            raise ValueError(f"llama.cpp cannot load {gguf.name}")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = length * rows
        settings.n_seq_max, settings.n_ubatch = rows, 512
        settings.n_threads = settings.n_threads_batch = cores()
        self.context = api.llama_init_from_model(model, settings)
        self.vocab_size = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> tuple[float, float]:
        """Seconds to the first tokens of all rows, and between tokens."""
        api = self.api
        api.llama_memory_clear(api.llama_get_memory(self.context), True)
        started = time.perf_counter()
        last = self._decode([(row, at, token) for row, p in enumerate(prompts) for at, token in enumerate(p)], prompts)
        first = time.perf_counter()
        for step in range(tokens - 1):
            last = self._decode([(row, len(p) + step, last[row]) for row, p in enumerate(prompts)], prompts, step + 1)
        return first - started, (time.perf_counter() - first) / (tokens - 1)

    def _decode(self, entries: list[tuple[int, int, int]], prompts: Sequence[list[int]], step: int = 0) -> list[int]:
        """The likeliest token after the last entry of each row; entries are (row, position, token)."""
        api = self.api
        batch = api.llama_batch_init(len(entries), 0, 1)
        batch.n_tokens, at = len(entries), []
        for n, (row, position, token) in enumerate(entries):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = token, position, 1, row
            batch.logits[n] = position == len(prompts[row]) - 1 + step
            if batch.logits[n]:
                at.append(n)
        code = api.llama_decode(self.context, batch)
        api.llama_batch_free(batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = (api.llama_get_logits_ith(self.context, n) for n in at)
        return [int(np.ctypeslib.as_array(pointer, (self.vocab_size,)).argmax()) for pointer in logits]


class OpenVino:
    """OpenVINO GenAI's pipeline, which makes its own graph of the GGUF file."""

    def __init__(self, gguf: Path, length: int, rows: int):
        import openvino
        import openvino_genai

        self.openvino, self.genai = openvino, openvino_genai
        self.pipeline = openvino_genai.LLMPipeline(str(gguf), "CPU", INFERENCE_NUM_THREADS=cores())

    def generate(self, prompts: Sequence[list[int]], tokens: int) -> tuple[float, float]:
        """As `LlamaCpp`."""
        config = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, do_sample=False)
        ids = np.array(prompts, np.int64)
        tensors = (self.openvino.Tensor(array) for array in (ids, np.ones_like(ids)))
        started = time.perf_counter()
        metrics = self.pipeline.generate(self.genai.TokenizedInputs(*tensors), config).perf_metrics
        ttft = metrics.get_ttft().mean / 1e3  # its time per token is of all rows' tokens, one after the other
        return ttft, (time.perf_counter() - started - ttft) / (tokens - 1)


PEERS = {"llama.cpp": ("llama_cpp", LlamaCpp), "OpenVINO GenAI": ("openvino_genai", OpenVino)}
"""By name: the package and what runs it."""


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    bandwidth = report["roof"]["used"]["bandwidth"]
    rows = [
        (
            *(row["program"], str(row["rows"]), f"{row['weight_bytes'] / 1e6:,.0f}"),
            *(number(row["prefill_tokens_per_s"]), milliseconds(min(row["tpot"])), number(row["decode_tokens_per_s"])),
            f"{row['weight_bytes'] / min(row['tpot']) / bandwidth:.2f}",
        )
        for row in sorted(report["rows"], key=lambda row: row["rows"])
    ]
    columns = ("program", "rows", "MB", "prompt, tok/s", "TPOT, ms", "decode, tok/s", "of bandwidth")
    yield Table(f"{report['subject']}, prompts of {report['prompt']}", columns, rows)
    yield f"Best of {report['repeats']} turns. Memory is read at {bandwidth / 1e9:.1f} GB/s."
    yield from (f"Left out: {name}: {why}" for name, why in report["out"].items())


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Decode beside the time that the weights take to be read."""
    bandwidth = report["roof"]["used"]["bandwidth"]
    for row in report["rows"]:
        limit = row["weight_bytes"] / bandwidth * 1e3
        yield Figure(f"{row['program']}, {row['rows']} rows", min(row["tpot"]) * 1e3, limit, "ms")
