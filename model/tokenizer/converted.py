"""Tokenizers in files that `tokenizers` does not read, converted by transformers, which is optional."""

from pathlib import Path
from typing import Any

import tokenizers

CONVERTED = ("tokenizer.model", "tekken.json")
"""The files that are converted: sentencepiece's and Mistral's."""

_BEGINS_TEXTS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer")


def converted(directory: Path, stated: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer in one of `CONVERTED`; no code of the checkpoint is run, and no network used.

    Args:
      directory: of the checkpoint.
      stated: the contents of tokenizer_config.json, to which is added what they leave to the tokenizer's class.

    Raises:
      ImportError: transformers, or a library that it needs for the file, is not installed.
      Exception: of any kind, where the file is damaged.
    """
    from transformers import PreTrainedTokenizerFast  # late: it takes a second

    # Not by AutoTokenizer: classes of models make their own pieces of the file, and drop its normalizer and its kind.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    backend, is_tekken = tokenizer.backend_tokenizer, not (directory / "tokenizer.model").exists()
    named = {"bos_token": "<s>", "eos_token": "</s>"} if is_tekken else tokenizer.special_tokens_map
    adds_bos = is_tekken or str(stated.get("tokenizer_class")).removesuffix("Fast") in _BEGINS_TEXTS
    stated.update({**named, "add_bos_token": adds_bos, **stated})
    return backend
