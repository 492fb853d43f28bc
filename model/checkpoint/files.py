"""The error that every part of loading raises, and the small JSON files of a checkpoint directory."""

import json
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; the message names the file, what was found and what to do."""


def parse_object(text: str | bytes, what: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
      CheckpointError: naming `what`, if it is not JSON, not an object, or names one key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, what))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON ({error}); the file is damaged, fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` naming the file."""
    try:
        return parse_object(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or {} where there is no such file."""
    return read_object(path) if path.exists() else {}


def listing(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many there are beyond them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _unique(pairs: list[tuple[str, Any]], what: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise CheckpointError(f"{what} names {twice!r} twice; each key must be there once")
    return found
