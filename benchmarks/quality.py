"""What every weight scheme and every KV scheme costs of a model's predictions, and the bytes that it saves.

Each is scored on the held-out parts of the books that the bundled models were trained on (`--text` is that file; see
`training/data.py` and the model card), beside the model in float32. Weights are rounded from the checkpoint's own,
activations are bfloat16.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from ..cli.common import UsageError
from ..decode.cache import init_cache
from ..decode.evaluate import evaluate
from ..model.loading import load_model
from ..model.params import Params
from ..model.schemes import SCHEMES
from ..training.data import read_books, split_book
from .formats import parse
from .harness import Table
from .limits import Figure
from .steps import kv_name

KV_SCHEMES = (None, "int8", "fp8")
PLAIN = "bfloat16"
CONTEXT = 1024  # evaluate's own
WEIGHTS = (
    "float32",
    PLAIN,
    *(f"{PLAIN}/{scheme}" for scheme in SCHEMES),
    f"{PLAIN}/int8+int8",
    f"{PLAIN}/int4-32+int8",
)
"""As `formats.parse` reads them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--text", type=Path, required=True, metavar="FILE", help="the books, parted by a line <|story|>")
    add("--model", default="bundled", metavar="DIR", help="a checkpoint directory, or 'bundled' (default)")
    add("--weights", metavar="NAME,...", help=f"only these, of {', '.join(WEIGHTS)}")
    add("--limit", type=int, metavar="N", help="score the first N tokens alone")
    quick = "for large models: the loss alone, each token computed once, the model in float32 and 8-bit caches left out"
    add("--quick", action="store_true", help=quick)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    weights = args.weights.split(",") if args.weights else list(WEIGHTS)
    unknown = [name for name in weights if name not in WEIGHTS]
    if unknown:
        raise UsageError(f"--weights {unknown[0]!r} is not known; known: {', '.join(WEIGHTS)}")
    texts = [stretch for book in read_books(args.text) for stretch in split_book(book)[1]]
    if not texts:
        raise UsageError(f"--text {args.text} is too short to hold out 3 % of it by whole paragraphs")
    rows = scored(args.model, texts, list(dict.fromkeys((PLAIN, *weights))), args.limit, args.quick)
    plain = next(row["loss"] for row in rows if row["weights"] == PLAIN)
    rows = [row | {"loss_delta_bfloat16": row["loss"] / plain - 1} for row in rows]
    yield {"subject": Path(args.model).name, "rows": rows}


def scored(
    model: str, texts: Sequence[str], weights: Sequence[str], limit: int | None, quick: bool
) -> list[dict[str, Any]]:
    """A row for every one of `weights` with every KV scheme, of texts that are each scored on its own.

    Returns:
      What `Evaluation.as_dict` has (`loss_delta` is of float32), the schemes, `parameter_bytes` read a token and
      `kv_bytes` a token of the cache.
    """
    reference, kv_schemes, rows = (None, (None,), []) if quick else (load_model(model, dtype="float32"), KV_SCHEMES, [])
    with tqdm(total=len(weights) * len(kv_schemes), bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:
        for name in weights:
            loaded = load_model(model, **parse(name))
            for kv in kv_schemes:
                bar.set_description(f"{name}, KV {kv}")
                stride = min(CONTEXT, loaded.config.max_position) if quick else None
                scores = evaluate(loaded, texts, kv_dtype=kv, limit=limit, stride=stride, against=reference)
                cache = init_cache(loaded.config, 1, 64, kv_dtype=kv)
                sizes = {"parameter_bytes": parameter_bytes(loaded.params), "kv_bytes": cache.nbytes // cache.capacity}
                schemes = {"weights": name, "kv": kv_name(loaded.config, kv)}
                rows.append(schemes | sizes | scores.as_dict())
                bar.update()
    return rows


def parameter_bytes(params: Params) -> int:
    """Bytes that a decode step of one row reads: all parameters, of an embedding that is not the output one row."""
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    embedding = params["embedding"]
    return total - embedding[1:].nbytes if "unembedding" in params else total


_BESIDE_FLOAT32 = {"loss_delta": "+.2%", "top1_agreement": ".1%", "kl_divergence": ".5f"}


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    rows = [
        (
            *(row["weights"], row["kv"], f"{row['parameter_bytes'] / 1e6:.2f}", f"{row['kv_bytes']:,}"),
            *(f"{row['loss']:.4f}", f"{row['loss_delta_bfloat16']:+.2%}"),
            *(format(row[name], form) if row[name] is not None else "-" for name, form in _BESIDE_FLOAT32.items()),
        )
        for row in report["rows"]
    ]
    columns = ("weights", "KV", "MB", "KV B", "nats", "to bf16", "to f32", "top-1", "KL")
    title = f"{report['subject']}, {report['rows'][0]['tokens']:,} held-out tokens"
    yield Table(title, columns, rows, names=2)
    yield (
        "MB: parameters read a token. KV B: keys and values a token. nats: loss a token, and how far above the loss in "
        "bfloat16 and in float32 it is. top-1, KL: against float32."
    )


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Each scheme's loss beside that of float32, or of bfloat16 where float32 was left out."""
    plain = next(row["loss"] for row in report["rows"] if row["weights"] == PLAIN)
    for row in report["rows"]:
        yield Figure(f"{row['weights']}, KV {row['kv']}", row["loss"], row["reference_loss"] or plain, "nats")
