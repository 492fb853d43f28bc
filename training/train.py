"""Trains the bundled story-teller and its draft model from a text file of books.

    python -m ridgeline.training.train --text stories.txt --out trained

writes trained/story and trained/draft, each a Hugging Face checkpoint folder that always holds the best model so far,
and beside them trained/*.checkpoint.safetensors, from which the same command goes on after it was stopped.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tokenizers import Tokenizer
from tqdm import tqdm

from ..model.params import count_parameters
from .data import Epochs, read_books, scoring_windows, split_book, token_stream, train_tokenizer
from .export import export, write
from .objective import held_out_loss, make_optimizer, make_step
from .recipe import EPOCHS, RECIPES, Recipe, initial_params, model_config


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
    epochs = args.epochs or EPOCHS[name]
    total_steps = epochs * batches.steps
    init_key, dropout_key = jax.random.split(jax.random.key(args.seed))
    params = initial_params(config, init_key)
    optimizer, plateau_end = make_optimizer(recipe, total_steps)
    state = optimizer.init(params)
    settings = {"recipe": dataclasses.asdict(recipe), "steps_per_epoch": batches.steps}
    settings |= {key: getattr(args, key) for key in ("vocab_size", "length", "batch_size", "seed")}
    progress = {"settings": settings, "epochs": epochs, "plateau_end": plateau_end, "step": 0, "curve": []}
    if path.exists():
        (params, state), saved = load_checkpoint(path, (params, state))
        _check_same_run(path, saved, progress)
        progress |= {key: saved[key] for key in ("step", "curve")}
    step, curve = progress["step"], progress["curve"]
    print(
        f"{name}: {count_parameters(config):,} parameters, {len(batches.stream):,} training tokens, "
        f"{batches.steps} steps an epoch, {epochs} epochs; held out: {scored:,.0f} tokens, {held_out_bytes:,} "
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
    limit = min(saved["plateau_end"], now["plateau_end"]) + 1  # the step that begins there is the last at full rate
    if saved["epochs"] != now["epochs"] and saved["step"] > limit:
        raise SystemExit(
            f"{path} stands at step {saved['step']} of {saved['epochs']} epochs; --epochs can be changed only up to "
            f"step {limit}, where the learning rate begins to fall"
        )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        prog="python -m ridgeline.training.train",
        description="Train the bundled story-teller and its draft model. A stopped run goes on where it stood.",
    )
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 text; books parted by a line <|story|>")
    parser.add_argument("--out", type=Path, required=True, help="folder for story/, draft/ and the checkpoints")
    parser.add_argument("--model", choices=[*RECIPES, "both"], default="both", help="which to train (default: both)")
    parser.add_argument(
        "--epochs", type=int, help="passes over the text (default: {story} and {draft})".format(**EPOCHS)
    )
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
            try:
                train(name, chosen, tokenizer, batches, held_out, args)
            except KeyboardInterrupt:
                raise SystemExit("stopped; the same command goes on from the last evaluation") from None


if __name__ == "__main__":
    main()
