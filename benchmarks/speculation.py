"""What each drafter guesses right, and how much faster tokens come so, on texts of several kinds.

For every drafter and number of drafted tokens: acceptance at each place of a draft, tokens a round, and the time of a
token against plain decoding, all in turns; and with that acceptance what a round would bring Llama 3.1 8B and 70B on an
H200, by the roof. Tokens are compared with those of plain decoding.

    ridgeline bench speculation path/to/target --draft path/to/draft --prompts prompts.jsonl --tokens 2,4,8
"""

import argparse
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..cli.common import UsageError, add_format_options, at_least_one, read_text, schemes, usage_errors
from ..cli.formats import integers
from ..decode import buckets
from ..decode.engine.engine import Engine
from ..decode.request import RequestOutput
from ..decode.sampling.params import SamplingParams
from ..decode.speculation.draft_model import ModelDrafter
from ..decode.speculation.drafter import MOST_TOKENS, Drafter
from ..decode.speculation.eagle import EagleDrafter
from ..decode.speculation.ngram import NGramDrafter
from ..model.find import find_config
from ..model.loading import Model, load_model
from ..roofline.deployment import Deployment
from ..roofline.hardware import find_hardware
from ..roofline.speculation import predict_speculation
from .harness import Table
from .limits import Figure
from .timing import in_turns, spread

PROMPTS = {
    "stories": ("Once upon a time", "The old king", "There was a little girl who"),
    "repeats": ("The wolf said, Let me come in. " * 6, "Row, row, row your boat. " * 6, "And the bell rang, and " * 8),
    "lists": (
        "One apple, two apples, three apples, four apples,",
        "On Monday he went to the sea, on Tuesday he went to the wood, on Wednesday he went",
        "The first was red, the second was blue, the third was green,",
    ),
}
"""For the bundled model, by kind."""
PLAIN = "plain", 0
TARGETS = {"llama-3.1-8b": ("bfloat16", "llama-3.2-1b"), "llama-3.1-70b": ("fp8", "llama-3.1-8b")}
"""Whose rounds are predicted: the weights that fit an H200, and what stands for a draft model."""
CONTEXT, BATCHES = 2048, (1, 32)
HEAD_VOCABULARY = 32_000
"""Of published EAGLE-3 heads, which are a layer besides."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", nargs="?", default="bundled", help="the target: a directory, or 'bundled' (default)")
    add("--draft", metavar="DIR", help="a draft model (default: the bundled draft of the bundled model)")
    add_format_options(parser)
    add("--eagle", metavar="DIR", help="an EAGLE-3 head")
    help = "numbers of tokens to draft (default: 1 to 8)"
    add("--tokens", type=integers, default=list(range(1, 9)), metavar="K,...", help=help)
    help = 'a line {"kind": ..., "prompt": ...} each (default: stories, text that repeats, lists)'
    add("--prompts", type=Path, metavar="FILE", help=help)
    add("--max-tokens", type=int, default=128, metavar="N", help="to make of each (default: %(default)s)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default: %(default)s)")
    add("--batch", type=int, default=1, metavar="B", help="prompts that run together (default: %(default)s)")
    add("--rounds", type=int, default=5, metavar="N", help="turns of each (default: %(default)s)")


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with usage_errors():
        at_least_one(args, "max_tokens", "batch", "rounds")
        if not all(1 <= tokens <= MOST_TOKENS for tokens in args.tokens):
            raise ValueError(f"--tokens are {args.tokens}; each must be 1 to {MOST_TOKENS}")
    prompts = PROMPTS if args.prompts is None else _read_prompts(args.prompts)
    target = load_model(args.model, dtype=args.dtype, **schemes(args))
    if target.tokenizer is None:
        raise UsageError(f"{args.model} has no tokenizer; name a model that has")
    contenders = {PLAIN: None} | {
        (name, tokens): make(tokens) for name, make in _drafters(args).items() for tokens in args.tokens
    }
    runs = {name: _Contender(target, args, prompts, drafter) for name, drafter in contenders.items()}
    with tqdm(total=len(runs) * (args.rounds + 1), disable=None, leave=False) as bar:
        timed, _ = in_turns(
            {name: run.turn for name, run in runs.items()}, args.rounds, required=runs, tick=lambda name: bar.update()
        )
    rows = [_row(kind, name, runs, timed) for kind in prompts for name in runs if name != PLAIN]
    other = sorted({f"{row['drafter']} {row['tokens']}" for row in rows if not row["same_tokens"]})
    in_float32 = target.config.dtype == "float32"
    yield {
        "subject": Path(args.model).name,
        "model": {"name": Path(args.model).name, "dtype": target.config.dtype, "kv": args.kv_dtype, **schemes(args)},
        "draft": None if args.draft is None else Path(args.draft).name,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "batch": args.batch,
        "rows": rows,
        "predicted": [one for row in rows for one in _predicted(row)],
        # In 16 bits sums over several tokens may round otherwise than those over one.
        "failures": [f"{name} drafted: other tokens than plain decoding's" for name in other if in_float32],
    }


def _read_prompts(file: Path) -> dict[str, list[str]]:
    prompts: dict[str, list[str]] = {}
    for number, line in enumerate(read_text("--prompts", file).splitlines(), 1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        match record:
            case {"kind": str(kind), "prompt": str(prompt)}:
                prompts.setdefault(kind, []).append(prompt)
            case _:
                raise UsageError(f'--prompts {file}, line {number}: expected {{"kind": ..., "prompt": ...}}')
    return prompts


def _drafters(args: argparse.Namespace) -> dict[str, Callable[[int], Drafter]]:
    made: dict[str, Callable[[int], Drafter]] = {"n-gram": NGramDrafter}
    name = args.draft or ("bundled-draft" if args.model == "bundled" else None)
    if name is not None:
        draft = load_model(name, dtype=args.dtype)
        made["draft model"] = lambda tokens: ModelDrafter(draft, tokens)
    if args.eagle is not None:
        made["EAGLE-3"] = lambda tokens: EagleDrafter(args.eagle, tokens)
    return made


class _Contender:
    """One way of making the tokens, on an engine of its own.

    Attributes:
      outputs, drafts: by kind, of the last turn: what was made, and how many tokens were drafted and accepted at each
        place, in how many rounds, which made how many tokens.
    """

    def __init__(
        self, target: Model, args: argparse.Namespace, prompts: Mapping[str, Sequence[str]], drafter: Drafter | None
    ):
        self._prompts = prompts
        self._sampling = SamplingParams(
            max_tokens=args.max_tokens, temperature=args.temperature, seed=0, ignore_eos=True
        )
        encoded = (target.tokenizer.encode(prompt) for kind in prompts.values() for prompt in kind)
        longest = buckets.cache_bucket(max(map(len, encoded)) + args.max_tokens)
        self._engine = Engine(
            target,
            args.batch,
            cache_tokens=args.batch * longest,
            max_length=longest,
            prefix_caching=False,
            kv_dtype=args.kv_dtype,
            whole_batches=True,
            drafter=drafter,
            adapt_drafts=False,
        )
        self.outputs: dict[str, list[RequestOutput]] = {}
        self.drafts: dict[str, tuple[int, int, list[int], list[int]]] = {}

    def turn(self) -> dict[str, float]:
        """Seconds a token after each prompt's first, by kind."""
        seconds = {}
        for kind, prompts in self._prompts.items():
            before = self._engine.stats().speculation
            places = {self._engine.submit(prompt, self._sampling): place for place, prompt in enumerate(prompts)}
            outputs = {places[chunk.index]: chunk.output for chunk in self._engine.run() if chunk.output}
            for output in outputs.values():
                output.raise_for_error()
            self.outputs[kind] = [outputs[place] for place in range(len(prompts))]
            seconds[kind] = sum(output.tpot for output in outputs.values()) / len(outputs)
            if before is not None:
                after = self._engine.stats().speculation
                drafted, accepted = (
                    [new - old for new, old in zip(getattr(after, name), getattr(before, name), strict=True)]
                    for name in ("drafted", "accepted")
                )
                self.drafts[kind] = after.rounds - before.rounds, after.tokens - before.tokens, drafted, accepted
        return seconds


def _row(
    kind: str,
    name: tuple[str, int],
    runs: Mapping[tuple[str, int], _Contender],
    timed: Mapping[tuple[str, int], Mapping[str, Any]],
) -> dict[str, Any]:
    plain, own = timed[PLAIN][kind], timed[name][kind]
    rounds, tokens, drafted, accepted = runs[name].drafts[kind]
    places = enumerate(zip(drafted, accepted, strict=True), 1)
    chances = {str(place): right / count if count else None for place, (count, right) in places}
    made = [[output.tokens for output in runs[each].outputs[kind]] for each in (PLAIN, name)]
    return {
        "kind": kind,
        "drafter": name[0],
        "tokens": name[1],
        "acceptance": chances,
        "tokens_per_round": tokens / rounds,
        "seconds_per_token": own.median,
        "plain_seconds_per_token": plain.median,
        "speedup": vars(spread([a / b for a, b in zip(plain.runs, own.runs, strict=True)])),
        "same_tokens": made[0] == made[1],
    }


def _predicted(row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a round with that acceptance brings other models on an H200."""
    hardware, acceptance = find_hardware("h200"), [chance or 0.0 for chance in row["acceptance"].values()]
    for target, (weights, small) in TARGETS.items():
        config = find_config(target).replace(dtype="bfloat16")
        drafting = {
            "n-gram": None,
            "draft model": find_config(small).replace(dtype="bfloat16"),
            "EAGLE-3": config.replace(layers=config.layers[:1], vocab_size=HEAD_VOCABULARY),
        }[row["drafter"]]
        deployment, draft = Deployment(config, weights), None if drafting is None else Deployment(drafting, weights)
        for batch in BATCHES:
            sizes = {"batch": batch, "context": CONTEXT, "acceptance": acceptance, "draft_tokens": row["tokens"]}
            best = predict_speculation(deployment, draft, hardware, **sizes)
            yield {name: row[name] for name in ("kind", "drafter", "tokens")} | {
                "model": target,
                "weights": weights,
                "hardware": hardware.name,
                "batch": batch,
                "context": CONTEXT,
                "tpot": best.tpot,
                "speedup": best.speedup,
            }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
        chances = " ".join("-" if chance is None else f"{chance:.2f}" for chance in row["acceptance"].values())
        ratio, how = row["speedup"], (row["kind"], row["drafter"], row["tokens"])
        there = [one for one in report["predicted"] if (one["kind"], one["drafter"], one["tokens"]) == how]
        return (
            *map(str, how),
            chances,
            f"{row['tokens_per_round']:.2f}",
            f"{row['seconds_per_token'] * 1e3:.2f}",
            f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            *(f"{one['speedup']:.2f}" for one in there),
        )

    predicted = [f"{name}, batch {batch}" for name in TARGETS for batch in BATCHES]
    columns = "kind", "drafter", "tokens", "accepted by place", "a round", "ms a token", "to plain", *predicted
    yield Table(
        f"{report['subject']}, batch {report['batch']}", columns, [cells(row) for row in report["rows"]], names=2
    )
    made = " and ".join(f"{small} for {name} in {weights}" for name, (weights, small) in TARGETS.items())
    yield (
        "accepted by place: of the tokens drafted there after a right beginning. to plain: times as fast as plain "
        f"decoding in the same turns. The last columns: on an H200 at context {CONTEXT:,}, by the roof and with this "
        f"acceptance; the draft model there is {made}."
    )


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Tokens a round beside the most that there could be."""
    for row in report["rows"]:
        what = f"{row['kind']}, {row['drafter']} {row['tokens']}"
        yield Figure(what, row["tokens_per_round"], row["tokens"] + 1, "tokens a round", rate=True)
