"""The tokenizer in a checkpoint directory, from all of its files."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ..checkpoint.files import LARGE, CheckpointError, check_file, is_there, listing, read_optional, read_text
from ..fields import Fields, Kind, an_object, any_of, flag, list_of, object_of, shortened, text, whole
from .converted import CONVERTED, converted
from .tokenizer import SPECIAL_TOKENS, Tokenizer, backend_errors

CONFIG = "tokenizer_config.json"
_OTHERS = (*CONVERTED, "tiktoken.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_ENDS = ("bos_token", "eos_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def _read_token(value: Any, file: str, name: str) -> AddedToken:
    fields = _TOKEN_FIELDS.read({"content": value} if isinstance(value, str) else value, file, name)
    return AddedToken(fields["content"], **{flag: fields[flag] for flag in _FLAGS if flag in fields})


_TOKEN_FIELDS = an_object({"content": text, **dict.fromkeys(_FLAGS, flag)})
_TOKEN = Kind("a text, or an object with content", _read_token)
_ID = whole(0)
_EXTRA = any_of(list_of(_TOKEN), object_of(_TOKEN))
_DECLARED: dict[str, Kind] = {
    **dict.fromkeys(SPECIAL_TOKENS, _TOKEN),
    "add_bos_token": flag,
    "add_eos_token": flag,
    "split_special_tokens": flag,
    "tokenizer_class": text,
    "added_tokens_decoder": object_of(_TOKEN),
    "extra_special_tokens": _EXTRA,
    "additional_special_tokens": _EXTRA,
    "chat_template": any_of(text, list_of(an_object({"name": text, "template": text}))),
}

_QWEN2 = (  # of models/qwen2/tokenization_qwen2.py of transformers
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_tokenizer(directory: Path, vocab_size: int | None = None) -> Tokenizer | None:
    """The tokenizer of a checkpoint directory, or None where it has none.

    Tokens that only the smaller files name are added to it, in transformers' order and so with its ids, special or not
    as they say.

    Args:
      directory: of the checkpoint.
      vocab_size: the model's, which ids lie within; None is any.

    Raises:
      CheckpointError: a file that does not parse, a tokenizer in files that are not read, or tokens that the model has
        no embedding of; naming it and the remedy.
    """
    stated = Fields(read_optional(directory / CONFIG), _DECLARED, str(directory / CONFIG))
    backend = _backend(directory, stated)
    if backend is None:
        return None
    listed, source = _listed_tokens(directory, stated)
    named, unnamed = _special_tokens(stated)
    _add_tokens(backend, listed, [*named.values(), *unnamed])
    if vocab_size is not None:
        _check_vocabulary(backend, directory, vocab_size)
    if not is_there(directory / "tokenizer.json"):
        _add_ends(backend, [named.get(name) if stated.get(f"add_{name}") else None for name in _ENDS])
    backend.encode_special_tokens = stated.get("split_special_tokens", False)
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


def _backend(directory: Path, stated: Fields) -> tokenizers.Tokenizer | None:
    file = directory / "tokenizer.json"
    if is_there(file):
        check_file(file, LARGE)
        with _damaged(f"{file} is no tokenizer that `tokenizers` reads"):
            return tokenizers.Tokenizer.from_file(str(file))
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    others = [name for name in (*_OTHERS, vocabulary.name, merges.name) if is_there(directory / name)]
    for name in others:
        check_file(directory / name, LARGE)
    kind = stated.get("tokenizer_class", "").removesuffix("Fast")
    if {vocabulary.name, merges.name} <= {*others} and kind in ("GPT2Tokenizer", "Qwen2Tokenizer"):
        return _byte_level(vocabulary, merges, kind)
    reason = ""
    if any(name in CONVERTED for name in others):
        try:
            return converted(directory, stated.values)
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


@contextlib.contextmanager
def _damaged(what: str) -> Iterator[None]:
    try:
        with backend_errors(what):
            yield
    except ValueError as error:
        raise CheckpointError(f"{error}; fetch it again") from error


def _check_vocabulary(backend: tokenizers.Tokenizer, directory: Path, vocab_size: int) -> None:
    """Raise `CheckpointError` for tokens beyond a vocabulary; added ones, which Gemma 3 has one of, are said."""
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    beyond = [token for token, id in backend.get_vocab().items() if id >= vocab_size]
    if not beyond:
        return
    what = f"the tokenizer in {directory} has {len(beyond)} tokens beyond the vocab_size {vocab_size} of config.json"
    if not added.issuperset(beyond):
        raise CheckpointError(f"{what}, {listing(beyond)}; one of the two belongs to another checkpoint")
    _say(f"{what}, which no prompt may have: {listing(beyond)}")


def _byte_level(vocabulary: Path, merges: Path, kind: str) -> tokenizers.Tokenizer:
    """A tokenizer of byte-level BPE whose files hold only tokens and merges: how text is split is the class's."""
    with _damaged(f"{vocabulary} and {merges} are no BPE"):
        backend = tokenizers.Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    if kind == "Qwen2Tokenizer":
        backend.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(tokenizers.Regex(_QWEN2), "isolated")
        bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _listed_tokens(directory: Path, stated: Fields) -> tuple[dict[int, AddedToken], Path]:
    """The tokens that a file lists by id; special_tokens_map.json is taken into `stated` where it counts.

    As in transformers, the two older files count only beside a config that lacks the newer list.
    """
    if (listed := stated.get("added_tokens_decoder")) is not None:
        if not all(id.isdecimal() and len(id) < 10 for id in listed):
            raise CheckpointError(f"{stated.file}: added_tokens_decoder has the ids {shortened([*listed])}")
        return dict(sorted((int(id), token) for id, token in listed.items())), directory / CONFIG
    stated.values.update(read_optional(directory / "special_tokens_map.json"))
    file = directory / "added_tokens.json"
    ids = {
        text.read(token, str(file), "a token"): _ID.read(id, str(file), token)
        for token, id in read_optional(file).items()
    }
    named, extra = _special_tokens(stated)
    special = {token.content for token in (*named.values(), *extra)}
    return {
        id: AddedToken(token, special=token in special) for token, id in sorted(ids.items(), key=lambda i: i[1])
    }, file


def _special_tokens(stated: Fields) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The special tokens that have a name, and those that have none; in the file's order, from which ids follow."""
    named = {}
    for name in stated:
        if name in SPECIAL_TOKENS and name in stated:
            named[name] = stated[name]
        elif name.endswith("_token") and isinstance(stated.values[name], str | Mapping):  # others count or switch
            named[name] = _TOKEN.read(stated.values[name], stated.file, name)
    extra = stated.get("extra_special_tokens") or stated.get("additional_special_tokens", ())
    named |= extra if isinstance(extra, Mapping) else {}
    unnamed = [] if isinstance(extra, Mapping) else list(extra)
    for token in (*named.values(), *unnamed):
        token.special = True
    return named, unnamed


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


def _chat_templates(directory: Path, stated: Fields) -> dict[str, str]:
    files = {path.stem: path for path in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if is_there(directory / "chat_template.jinja"):
        files["default"] = directory / "chat_template.jinja"
    if files:
        return {name: read_text(path) for name, path in files.items()}
    older = directory / "chat_template.json"  # of processors, which multimodal checkpoints have
    if "chat_template" not in stated:
        stated = Fields(read_optional(older), _DECLARED, str(older))
    template = stated.get("chat_template", ())
    return {"default": template} if isinstance(template, str) else {t["name"]: t["template"] for t in template}
