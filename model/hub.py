"""Models by their names on the Hugging Face Hub: in the cache on this machine, or downloaded into it."""

import os
import re
from pathlib import Path

from .checkpoint import kinds
from .checkpoint.files import CheckpointError, is_there
from .checkpoint.safetensors import INDEX, SINGLE, read_index
from .checkpoint.settings import QUANTIZATION
from .checkpoint.writing import BESIDE

FILES = ("config.json", *BESIDE, *QUANTIZATION, INDEX, "model*.safetensors", "additional_chat_templates/*")
"""What is downloaded of a repository: the files that are read."""


def is_hub_name(name: str) -> bool:
    """Whether a name may be a repository's, "organization/model"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None


def cached(name: str) -> Path | None:
    """The snapshot that `main` of a repository names, where the cache holds all of its weights; else None.

    Raises:
      CheckpointError: a file of the cache that is damaged.
    """
    repository = _cache() / f"models--{name.replace('/', '--')}"
    if not repository.is_dir():
        return None
    snapshot = kinds.snapshot(repository)
    files = {"config.json", SINGLE}
    if is_there(snapshot / INDEX):
        files = {"config.json", *read_index(snapshot / INDEX).values()}
    return snapshot if all(is_there(snapshot / file) for file in files) else None


def download(name: str) -> Path:
    """The snapshot of a repository, downloaded by huggingface_hub, which draws its own progress bar.

    Raises:
      CheckpointError: huggingface_hub is not installed, or cannot download it.
    """
    where = f"{name} is no directory here, nor is all of it in the Hugging Face cache, {_cache()}"
    try:
        from huggingface_hub import snapshot_download  # late, and optional
    except ImportError as error:
        raise CheckpointError(
            f"{where}; pip install 'ridgeline[hub]' for it to be downloaded, or run: hf download {name}"
        ) from error
    try:
        return Path(snapshot_download(name, cache_dir=_cache(), allow_patterns=list(FILES)))
    except Exception as error:  # of many kinds, by what the network and the Hub answer
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{where}; it cannot be downloaded: {reason:.300}") from error


def _cache() -> Path:
    """Where huggingface_hub keeps what it downloads."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()
