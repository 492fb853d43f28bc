"""What the writers of checkpoints share: a directory that is there whole or not at all, and the files taken over."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from .description import INCOMPLETE
from .files import CheckpointError, is_there

BESIDE = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "tekken.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
"""What a directory that is written takes over as it is, where it is there."""


@contextlib.contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """`<out>.incomplete`, to be filled; it is renamed to `out` at the end, or removed if anything is raised.

    Raises:
      CheckpointError: `out` exists, or `<out>.incomplete` does.
    """
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"{out} exists already; give another directory, or remove it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + INCOMPLETE)
    try:
        partial.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{partial} exists: a conversion to {out} was killed, or is running; if none is running, remove it and "
            "try again"
        ) from None
    try:
        yield partial
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def copy_small_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copy those of the files and folders that are there."""
    for name in names:
        if (source / name).is_dir():
            shutil.copytree(source / name, target / name)
        elif is_there(source / name):
            shutil.copyfile(source / name, target / name)
