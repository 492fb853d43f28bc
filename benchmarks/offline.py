"""What `latency` and `throughput` have in common: requests of one size, all there at the beginning."""

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..cli.common import add_format_options, at_least_one, usage_errors
from ..decode import buckets
from ..decode.engine.engine import Engine
from . import subject as subjects
from .servers import GREEDY


def add_sizes(parser: argparse.ArgumentParser, input_len: int, output_len: int) -> Callable[..., Any]:
    """The options of model and requests; returns what adds more."""
    subjects.add_arguments(parser, default="bundled")
    add_format_options(parser)
    add = parser.add_argument
    add("--input-len", type=int, default=input_len, metavar="N", help="tokens of each prompt (default: %(default)s)")
    add("--output-len", type=int, default=output_len, metavar="N", help="tokens to make (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="S", help="of the prompts' random tokens (default: %(default)s)")
    return add


class Offline:
    """A model and requests of one size.

    Args:
      args: of `add_sizes`.
      names: of other arguments that are to be 1 or more.
    """

    def __init__(self, args: argparse.Namespace, *names: str):
        self.args, self.length = args, args.input_len + args.output_len
        with usage_errors():
            at_least_one(args, "input_len", "output_len", *names)
            schemes = args.dtype, args.quantize, args.quantize_output
            subject = subjects.find_subject(args.model, args.layers, args.set, *schemes)
            most = subject.config.max_position
            if self.length > most:
                raise ValueError(f"--input-len and --output-len are {self.length} together; the model takes {most}")
        self.model = subjects.make_model(subject)
        sizes = {"input_len": args.input_len, "output_len": args.output_len, "seed": args.seed}
        self.settings = {"subject": subject.title, "model": subject.record | {"kv": args.kv_dtype}, **sizes}

    def engine(self, max_batch_size: int, prompts: Sequence[list[int]]) -> Engine:
        """With all compiled that these prompts need; it remembers none, so that each run does all of the work."""
        engine = Engine(
            self.model,
            max_batch_size,
            max_length=buckets.cache_bucket(self.length),
            prefix_caching=False,
            kv_dtype=self.args.kv_dtype,
        )
        with engine.rehearsal():
            self.run(engine, prompts)
        return engine

    def prompts(self, count: int) -> list[list[int]]:
        rng = np.random.default_rng(self.args.seed)
        return rng.integers(self.model.config.vocab_size, size=(count, self.args.input_len)).tolist()

    def run(self, engine: Engine, prompts: Sequence[list[int]]) -> int:
        """Serve all of them; how many tokens were made."""
        for prompt in prompts:
            engine.submit(prompt, dataclasses.replace(GREEDY, max_tokens=self.args.output_len))
        made = 0
        for chunk in engine.run():
            if chunk.output is not None and chunk.output.error is not None:
                raise chunk.output.error
            made += len(chunk.tokens)
        return made
