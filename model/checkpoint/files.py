"""The files of a checkpoint directory: what may be opened, and the small ones, which are read whole."""

import collections
import json
import os
import stat
from pathlib import Path
from typing import Any

from ..fields import CheckpointError

SMALL = 64 * 2**20
"""Bytes that a file of text or JSON may have; the largest published index has some 10 MB."""
LARGE = 2**30
"""The same of a file that another library parses, such as a tokenizer."""

_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
_FETCH = "the file is damaged, fetch it again"


def is_there(path: Path) -> bool:
    """Whether there is anything of that name; what cannot be read, such as a link to nothing, is refused when it is."""
    return os.path.lexists(path)


def check_file(path: Path, most: int | None = None) -> int:
    """The bytes that a file has; nothing is opened.

    Args:
      path: which may be a link.
      most: bytes that it may have; None is any number.

    Raises:
      CheckpointError: there is none, it is something else than a file, or larger.
    """
    try:
        status = os.stat(path)
    except FileNotFoundError as error:
        what = f"is a link to {os.readlink(path)}, which" if path.is_symlink() else "cannot be read: it"
        raise CheckpointError(f"{path} {what} is not there; fetch the file") from error
    except (OSError, ValueError) as error:  # ValueError of a name that no file can have
        raise CheckpointError(f"{path!s:.1000} cannot be read: {getattr(error, 'strerror', error)}") from error
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise CheckpointError(f"{path} is {kind}, where a file belongs; fetch that file")
    if most is not None and status.st_size > most:
        raise CheckpointError(f"{path} has {status.st_size:,} bytes, more than the {most:,} that such a file may have")
    return status.st_size


def read_text(path: Path) -> str:
    """The text in a small file; raises `CheckpointError` naming the file."""
    check_file(path, SMALL)
    try:
        with path.open("rb") as file:
            return decode(file.read(SMALL), str(path))  # of some files, such as those in /proc, the size says nothing
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


def decode(data: bytes, what: str) -> str:
    """Text in UTF-8; raises `CheckpointError` naming `what`."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{what} is not UTF-8 (byte {error.start} is 0x{data[error.start]:02x}); {_FETCH}"
        ) from error


def parse_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Raises:
      CheckpointError: naming `what`, if it is not JSON, not an object, or names one key twice.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON ({error}); {_FETCH}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} holds a JSON {type(value).__name__}, expected an object")
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; raises `CheckpointError` naming the file."""
    return parse_object(read_text(path), str(path))


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or {} where there is no such file."""
    return read_object(path) if is_there(path) else {}


def listing(names: list[str], limit: int = 5) -> str:
    """The first few names, and how many there are beyond them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names {twice!r} twice")
    return values
