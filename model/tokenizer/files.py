"""The tokenizer in a checkpoint directory, from all of its files."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ..checkpoint.files import CheckpointError, listing, read_optional
from .converted import CONVERTED, converted
from .tokenizer import SPECIAL_TOKENS, Tokenizer

CONFIG = "tokenizer_config.json"
_OTHERS = (*CONVERTED, "tiktoken.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_ENDS = ("bos_token", "eos_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")

_QWEN2 = (  # of models/qwen2/tokenization_qwen2.py of transformers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None where it has none.

    Tokens that only the smaller files name are added to it, in transformers' order and so with its ids, special or not
    as they say.

    Raises:
      CheckpointError: a file that does not parse, or a tokenizer in files that are not read; naming it and the remedy.
    """
    stated = read_optional(directory / CONFIG)
    backend = _backend(directory, stated)
    if backend is None:
        return None
    listed, source = _listed_tokens(directory, stated)
    named, unnamed = _special_tokens(stated, directory / CONFIG)
    _add_tokens(backend, listed, [*named.values(), *unnamed])
    if not (directory / "tokenizer.json").exists():
        _add_ends(backend, [named.get(name) if stated.get(f"add_{name}") else None for name in _ENDS])
    backend.encode_special_tokens = bool(stated.get("split_special_tokens"))
    tokenizer = Tokenizer(
        backend, {name: token.content for name, token in named.items()}, _chat_templates(directory, stated)
    )
    moved = [token.content for id, token in listed.items() if backend.token_to_id(token.content) != id]
    if moved:
        _say(f"{source} gives {listing(moved)} other ids than tokenizer.json leads to, which are used")
    for name, place in zip(_ENDS, (0, -1), strict=True):
        adds = stated.get(f"add_{name}")
        if adds is not None and adds != (tokenizer.special_id(name) in tokenizer.encode("a")[place:][:1]):
            _say(f"{directory / CONFIG} has add_{name} {adds!r}, and tokenizer.json does otherwise, which is followed")
    return tokenizer


def _say(message: str) -> None:
    warnings.warn(message, stacklevel=4)


def _backend(directory: Path, stated: dict[str, Any]) -> tokenizers.Tokenizer | None:
    file = directory / "tokenizer.json"
    if file.exists():
        try:
            return tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # what the Rust side raises is a bare Exception
            raise CheckpointError(
                f"{file} is no tokenizer that `tokenizers` reads ({error}); fetch it again"
            ) from error
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    others = [name for name in (*_OTHERS, vocabulary.name, merges.name) if (directory / name).exists()]
    kind = str(stated.get("tokenizer_class")).removesuffix("Fast")
    if vocabulary.exists() and merges.exists() and kind in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        return _byte_level(vocabulary, merges, kind)
    reason = ""
    if any(name in CONVERTED for name in others):
        try:
            return converted(directory, stated)
        except Exception as error:  # of any kind: the files are transformers' to read
            first_line = (str(error).strip() or repr(error)).splitlines()[0]
            reason = f", and it could not be converted ({first_line:.200})"
    if others:
        raise CheckpointError(
            f"{directory} has its tokenizer in {listing(others)} and no tokenizer.json, which is what is read{reason}; "
            f"for {' and '.join(CONVERTED)} pip install 'ridgeline[tokenizers]', or write tokenizer.json where "
            "transformers, sentencepiece and tiktoken are installed: python -c 'from transformers import AutoTokenizer "
            f'as A; A.from_pretrained("{directory}").save_pretrained("{directory}")\''
        )
    return None


def _byte_level(vocabulary: Path, merges: Path, kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of byte-level BPE whose files hold only tokens and merges: how text is split is the class's."""
    try:
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    except Exception as error:  # as above
        raise CheckpointError(f"{vocabulary} and {merges} are no BPE ({error}); fetch them again") from error
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _listed_tokens(directory: Path, stated: dict[str, Any]) -> tuple[dict[int, AddedToken], Path]:
    """The tokens that a file lists by id; special_tokens_map.json is taken into `stated` where it counts.

    As in transformers, the two older files count only beside a config that lacks the newer list.
    """
    file = directory / CONFIG
    if (listed := stated.get("added_tokens_decoder")) is not None:
        if not isinstance(listed, dict) or not all(id.isdecimal() for id in listed):
            raise CheckpointError(f"{file}: added_tokens_decoder is {listed!r}, expected an object of ids and tokens")
        tokens = {int(id): _token(token, file) for id, token in listed.items()}
        return dict(sorted(tokens.items())), file
    stated.update(read_optional(directory / "special_tokens_map.json"))
    file = directory / "added_tokens.json"
    listed = read_optional(file)
    if not all(type(id) is int for id in listed.values()):
        raise CheckpointError(f"{file} holds {listed!r:.200}, expected an object of tokens and ids")
    named, extra = _special_tokens(stated, directory / CONFIG)
    special = {token.content for token in (*named.values(), *extra)}
    tokens = {id: AddedToken(text, special=text in special) for text, id in listed.items()}
    return dict(sorted(tokens.items())), file


def _special_tokens(stated: Mapping[str, Any], file: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens that have a name, and those that have none."""
    extra = stated.get("extra_special_tokens") or stated.get("additional_special_tokens") or []
    if not isinstance(extra, list | Mapping):
        raise CheckpointError(f"{file}: extra special tokens are {extra!r}, expected a list or an object of tokens")
    known, more = {}, extra if isinstance(extra, Mapping) else {}
    for name, value in (*stated.items(), *more.items()):
        is_token = isinstance(value, str) or (isinstance(value, Mapping) and "content" in value)
        if is_token and (name in SPECIAL_TOKENS or name in more or name.endswith("_token")):
            known[name] = _token(value, file, special=True)
    return known, [_token(value, file, special=True) for value in (() if more else extra)]


def _token(value: Any, file: Path, special: bool | None = None) -> AddedToken:
    """An added token: its text, or an object of its text and flags."""
    if isinstance(value, str):
        value = {"content": value}
    flags = {name: value[name] for name in _FLAGS if name in value} if isinstance(value, Mapping) else {}
    if not isinstance(value, Mapping) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{file}: {value!r:.200} is no token, expected a text, or an object with content")
    if not all(type(flag) is bool for flag in flags.values()):
        raise CheckpointError(f"{file}: token {value['content']!r} has flags {flags}, expected true or false")
    return AddedToken(value["content"], **(flags | ({} if special is None else {"special": special})))


def _add_tokens(backend: tokenizers.Tokenizer, listed: dict[int, AddedToken], special: list[AddedToken]) -> None:
    """Add what the tokenizer lacks, in the order of `PreTrainedTokenizerFast`, since ids follow from it."""
    by_text = {token.content: token for token in listed.values()}
    for token in special:
        if token.content in by_text:
            by_text[token.content].special = True
    known = [*map(repr, backend.get_added_tokens_decoder().values())]
    new = [token for token in listed.values() if repr(token) not in known]
    texts = {token.content for token in (*backend.get_added_tokens_decoder().values(), *new)}
    backend.add_tokens([*new, *(token for token in special if token.content not in texts)])


def _add_ends(backend: tokenizers.Tokenizer, ends: list[AddedToken | None]) -> None:
    """Have BOS and EOS put around a text, where they are not None."""
    bos, eos = ("" if end is None else f"{end.content}:0" for end in ends)
    tokens = [(end.content, backend.token_to_id(end.content)) for end in ends if end is not None]
    backend.post_processor = processors.TemplateProcessing(f"{bos} $A:0 {eos}".strip(), special_tokens=tokens)


def _chat_templates(directory: Path, stated: Mapping[str, Any]) -> dict[str, str]:
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if (directory / "chat_template.jinja").exists():
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    older = directory / "chat_template.json"  # of processors, which multimodal checkpoints have
    file = directory / CONFIG if stated.get("chat_template") is not None or not older.exists() else older
    match (stated if file.name == CONFIG else read_optional(older)).get("chat_template"):
        case None:
            return {}
        case str(template):
            return {"default": template}
        case [*named] if all(isinstance(t, Mapping) and {"name", "template"} <= set(t) for t in named):
            return {t["name"]: t["template"] for t in named}
        case other:
            raise CheckpointError(
                f"{file}: chat_template is a {type(other).__name__}, expected a template or a list of objects with "
                "name and template"
            )
