"""Trains the bundled story-teller and its draft model from a text file of books.

    python -m ridgeline.model.bundled.train --text stories.txt --out trained

writes trained/story and trained/draft, each a Hugging Face checkpoint folder that always holds the best model so far,
and beside them trained/*.checkpoint.safetensors, from which the same command goes on after it was stopped.
"""

import argparse
import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer
from tqdm import tqdm

from ..config import LayerConfig, ModelConfig, RopeConfig
from ..params import Params, count_parameters, init_params
from ..transformer import transformer, unembed
from .data import Epochs, Windows, read_books, scoring_windows, split_book, token_stream, train_tokenizer
from .export import export, write
from .gradients import attention, cross_entropy, fast_products


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained and how.

    Attributes:
      learning_rate: of the plateau, between warm-up and the cosine decay to zero.
      dropout: share of the MLP's hidden units and of the attention outputs left out, drawn anew each step.
      weight_decay: of matrices; norms have none.
      decay_share: share of all steps that the final decay takes.
      warmup: steps.
    """

    embed_dim: int
    num_layers: int
    ffn_dim: int
    learning_rate: float
    dropout: float
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 32
    weight_decay: float = 0.1
    decay_share: float = 0.5
    warmup: int = 200


# The same head geometry in both, so that they shard alike.
RECIPES = {
    "story": Recipe(embed_dim=256, num_layers=5, ffn_dim=768, learning_rate=2e-3, dropout=0.1),
    "draft": Recipe(embed_dim=96, num_layers=2, ffn_dim=192, learning_rate=4e-3, dropout=0.0),
}


def model_config(recipe: Recipe, vocab_size: int, max_position: int) -> ModelConfig:
    """The Llama architecture of a recipe."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        embed_dim=recipe.embed_dim,
        ffn_dim=recipe.ffn_dim,
        num_heads=recipe.num_heads,
        num_kv_heads=recipe.num_kv_heads,
        head_dim=recipe.head_dim,
        layers=(LayerConfig(RopeConfig(recipe.head_dim)),) * recipe.num_layers,
        max_position=max_position,
        norm_eps=1e-5,
        query_scale=recipe.head_dim**-0.5,
        tie_embeddings=True,
        dtype="bfloat16",
    )


def initial_params(config: ModelConfig, key: jax.Array) -> Params:
    """Float32 master weights; what feeds the residual stream starts smaller the more layers there are (GPT-2)."""
    params = init_params(config.replace(dtype="float32"), key)
    scale = (2 * config.num_layers) ** -0.5
    for layer in params["layers"]:
        layer["out"], layer["down"] = layer["out"] * scale, layer["down"] * scale
    return params


def losses(params: Params, config: ModelConfig, tokens: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, [B, T] float32."""

    def attend(q, k, v, spec, state):
        return attention(q, k, v), state

    B, T = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    state = (None,) * config.num_layers
    x, _ = transformer(params, config, tokens, positions, attend, state, jnp.full((B,), T))
    return cross_entropy(unembed(params, config, x), targets)


def drop_units(params: Params, key: jax.Array, rate: float) -> Params:
    """Dropout by weights: the columns of `down` and `out` that read a dropped unit are zero, the others scaled up."""
    if rate == 0.0:
        return params
    layers = []
    for index, layer in enumerate(params["layers"]):
        keys = jax.random.split(jax.random.fold_in(key, index))
        kept = {
            name: layer[name] * (jax.random.bernoulli(k, 1 - rate, layer[name].shape[1:]) / (1 - rate))
            for name, k in zip(("down", "out"), keys, strict=True)
        }
        layers.append(layer | kept)
    return params | {"layers": layers}


def make_optimizer(recipe: Recipe, total_steps: int) -> tuple[optax.GradientTransformation, int]:
    """AdamW with clipping, and the step at which its learning rate begins to fall.

    Until that step training does not depend on its total length, so that a run can be made longer or shorter.
    """
    decay = max(1, round(total_steps * recipe.decay_share))
    warmup, plateau_end = min(recipe.warmup, total_steps - decay), total_steps - decay

    def schedule(step):
        rising = (step + 1) / max(warmup, 1)
        falling = 0.5 * (1 + jnp.cos(math.pi * jnp.clip((step - plateau_end) / decay, 0.0, 1.0)))
        return recipe.learning_rate * jnp.minimum(jnp.minimum(rising, 1.0), falling)

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=recipe.weight_decay,
            mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
        ),
    ), plateau_end


def _bfloat16(params: Params) -> Params:
    return jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)


def make_step(config: ModelConfig, recipe: Recipe, optimizer: optax.GradientTransformation, key: jax.Array):
    """The compiled training step: (params, optimizer state, step, tokens, targets) -> (params, state, mean loss)."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def train_step(params, state, step, tokens, targets):
        def mean_loss(params):
            dropped = drop_units(_bfloat16(params), jax.random.fold_in(key, step), recipe.dropout)
            return losses(_bfloat16(dropped), config, tokens, targets).mean()

        with fast_products():
            loss, grads = jax.value_and_grad(mean_loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return train_step


def held_out_loss(params: Params, config: ModelConfig, windows: Windows, batch_size: int) -> float:
    """Summed loss of the windows in nats, with the weights rounded to bfloat16 as they are exported."""
    score = _scorer(config)
    rounded, total = _bfloat16(params), 0.0
    for first in range(0, len(windows.tokens), batch_size):
        rows = [a[first : first + batch_size] for a in (windows.tokens, windows.targets, windows.weights)]
        rows = [np.pad(a, ((0, batch_size - len(a)), (0, 0))) for a in rows]
        total += float(score(rounded, *rows))
    return total


@functools.cache
def _scorer(config: ModelConfig):
    def score(params, tokens, targets, weights):
        return (losses(params, config, tokens, targets) * weights).sum()

    return jax.jit(score)


def save_checkpoint(path: Path, tree: Any, progress: dict[str, Any]) -> None:
    """Write the whole state of a run in one atomic step."""
    leaves = {f"{i:04}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(tree))}
    write(path, save(leaves, {"progress": json.dumps(progress)}))


def load_checkpoint(path: Path, tree: Any) -> tuple[Any, dict[str, Any]]:
    """The state that `save_checkpoint` wrote, in the structure of `tree`, and the progress with it."""
    leaves, treedef = jax.tree.flatten(tree)
    try:
        with safe_open(path, "numpy") as file:
            progress = json.loads(file.metadata()["progress"])
            found = [file.get_tensor(f"{i:04}") for i in range(len(leaves))]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{path} is not a checkpoint of this program ({error}); delete it to begin anew") from None
    if [a.shape for a in found] != [a.shape for a in leaves]:
        raise SystemExit(f"{path} is a checkpoint of a model of another size; delete it, or choose another --out")
    return treedef.unflatten(map(jnp.asarray, found)), progress


def train(name: str, recipe: Recipe, tokenizer: Tokenizer, batches: Epochs, held_out: list[str], args) -> None:
    """Train one model from where its checkpoint stands, exporting every new best to `args.out / name`."""
    config = model_config(recipe, tokenizer.get_vocab_size(), args.length)
    path = args.out / f"{name}.checkpoint.safetensors"
    windows = scoring_windows(tokenizer, held_out, args.length)
    scored, held_out_bytes = float(windows.weights.sum()), sum(len(text.encode()) for text in held_out)
    total_steps = args.epochs * batches.steps
    init_key, dropout_key = jax.random.split(jax.random.key(args.seed))
    params = initial_params(config, init_key)
    optimizer, plateau_end = make_optimizer(recipe, total_steps)
    state = optimizer.init(params)
    settings = {"recipe": dataclasses.asdict(recipe), "steps_per_epoch": batches.steps}
    settings |= {key: getattr(args, key) for key in ("vocab_size", "length", "batch_size", "seed")}
    progress = {"settings": settings, "epochs": args.epochs, "plateau_end": plateau_end, "step": 0, "curve": []}
    if path.exists():
        (params, state), saved = load_checkpoint(path, (params, state))
        _check_same_run(path, saved, progress)
        progress |= {key: saved[key] for key in ("step", "curve")}
    step, curve = progress["step"], progress["curve"]
    print(
        f"{name}: {count_parameters(config):,} parameters, {len(batches.stream):,} training tokens, "
        f"{batches.steps} steps an epoch, {args.epochs} epochs; held out: {scored:,.0f} tokens, {held_out_bytes:,} "
        f"bytes; beginning at step {step}",
        flush=True,
    )
    train_step = make_step(config, recipe, optimizer, dropout_key)
    recent: list[jax.Array] = []
    with tqdm(total=total_steps, initial=step, desc=name, unit="step", smoothing=0.05, mininterval=1.0) as bar:
        while step < total_steps:
            tokens, targets = batches.batch(step)
            params, state, loss = train_step(params, state, step, tokens, targets)
            recent.append(loss)
            step += 1
            bar.update()
            if step % 10 == 0:
                rate = (bar.format_dict["rate"] or 0.0) * tokens.size
                bar.set_postfix_str(f"loss {float(np.mean(recent[-10:])):.3f}, {rate:,.0f} tokens/s", refresh=False)
            if step % args.eval_every == 0 or step == total_steps:
                nats = held_out_loss(params, config, windows, args.batch_size)
                entry = {
                    "step": step,
                    "epoch": round(step / batches.steps, 3),
                    "train_nats_per_token": round(float(np.mean(recent)), 4),
                    "held_out_nats_per_token": round(nats / scored, 4),
                    "held_out_bits_per_byte": round(nats / math.log(2) / held_out_bytes, 4),
                }
                recent.clear()
                best = min((e["held_out_nats_per_token"] for e in curve), default=math.inf)
                curve.append(entry)
                bar.write(f"{name} " + ", ".join(f"{key} {value}" for key, value in entry.items()))
                if entry["held_out_nats_per_token"] < best:
                    export(args.out / name, params, config, tokenizer, curve)
                save_checkpoint(path, (params, state), progress | {"step": step})
    write(args.out / name / "training.json", (json.dumps(curve, indent=2) + "\n").encode())
    best = min(curve, key=lambda e: e["held_out_nats_per_token"])
    print(
        f"{name}: best held out {best['held_out_nats_per_token']} nats a token, "
        f"{best['held_out_bits_per_byte']} bits a byte, at step {best['step']}; written to {args.out / name}",
        flush=True,
    )


def _check_same_run(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [key for key, value in now["settings"].items() if saved["settings"].get(key) != value]
    if changed:
        raise SystemExit(f"{path} was made with another {', '.join(changed)}; delete it, or choose another --out")
    limit = min(saved["plateau_end"], now["plateau_end"])
    if saved["epochs"] != now["epochs"] and saved["step"] > limit:
        raise SystemExit(
            f"{path} stands at step {saved['step']} of {saved['epochs']} epochs; --epochs can be changed only up to "
            f"step {limit}, where the learning rate begins to fall"
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m ridgeline.model.bundled.train",
        description="Train the bundled story-teller and its draft model. A stopped run goes on where it stood.",
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; books parted by a line <|story|>")
    parser.add_argument("--out", type=Path, required=True, help="folder for story/, draft/ and the checkpoints")
    parser.add_argument("--model", choices=[*RECIPES, "both"], default="both", help="which to train (default: both)")
    parser.add_argument("--epochs", type=int, default=12, help="passes over the text (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=2048, help="tokens (default: %(default)s)")
    parser.add_argument("--length", type=int, default=1024, help="context in tokens (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=4, help="rows of that length a step (default: %(default)s)")
    parser.add_argument("--eval-every", type=int, default=100, help="steps between evaluations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and dropout (default: %(default)s)")
    for field in ("embed_dim", "num_layers", "ffn_dim", "learning_rate", "dropout"):
        kind = float if field in ("learning_rate", "dropout") else int
        parser.add_argument(f"--{field.replace('_', '-')}", type=kind, help="instead of the recipe's own")
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "eval_every", "embed_dim", "num_layers", "ffn_dim", "learning_rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be positive")
    if args.length < 8 or args.length % 2:
        parser.error(f"--length is {args.length}; it must be even and at least 8")
    if args.vocab_size < 258:
        parser.error(f"--vocab-size is {args.vocab_size}; 256 bytes and two special tokens need at least 258")
    if args.seed < 0:
        parser.error(f"--seed is {args.seed}; it must not be negative")
    if args.dropout is not None and not 0 <= args.dropout < 1:
        parser.error(f"--dropout is {args.dropout}; it must be at least 0 and below 1")
    return args


def main(argv: list[str] | None = None) -> None:
    """Run the command line."""
    args = parse_arguments(argv)
    documents, held_out = [], []
    for book in read_books(args.text):
        kept, stretches = split_book(book)
        documents += kept
        held_out += stretches
    if not held_out or not documents:
        raise SystemExit(f"the text {args.text} is too short to hold out 3 % of it by whole paragraphs")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out {args.out} cannot be made: {error}") from None
    tokenizer = train_tokenizer([document.text for document in documents], args.vocab_size)
    stream = token_stream(tokenizer, documents)
    batches = Epochs(stream, tokenizer, args.length, args.batch_size, args.seed)
    for name, recipe in RECIPES.items():
        if args.model in (name, "both"):
            given = {f.name: getattr(args, f.name, None) for f in dataclasses.fields(recipe)}
            chosen = dataclasses.replace(recipe, **{key: value for key, value in given.items() if value is not None})
            train(name, chosen, tokenizer, batches, held_out, args)


if __name__ == "__main__":
    main()
