"""What a checkpoint asks of generation: where its texts end, what they never hold, how they are drawn."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from .checkpoint.files import listing, read_object, read_optional
from .fields import CheckpointError, Fields, Kind, flag, list_of, number, some_text, whole
from .hf.multimodal import text_part
from .tokenizer import Tokenizer

FILE = "generation_config.json"

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "assistant_confidence_threshold": (0.4,),
    "diversity_penalty": (0.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "guidance_scale": (1.0,),
    "length_penalty": (1.0,),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "typical_p": (1.0,),
}
"""The values of keys that are not read which change nothing."""

_NEVER = ("suppress_tokens", "begin_suppress_tokens")
_TOKENS = list_of(whole(-1), one=True)
"""Token ids, one or some; -1 is none."""
DECLARED: dict[str, Kind] = {
    "eos_token_id": _TOKENS,
    "bos_token_id": _TOKENS,
    "pad_token_id": _TOKENS,
    "suppress_tokens": _TOKENS,
    "begin_suppress_tokens": _TOKENS,
    "bad_words_ids": list_of(list_of(whole(0), least=1)),
    "stop_strings": list_of(some_text, one=True),
    "do_sample": flag,
    "temperature": number(0, 1e6),
    "top_p": number(0, 1, above=True),
    "top_k": whole(-1),
    "min_p": number(0, 1),
    "repetition_penalty": number(0, 1e6, above=True),
    "max_new_tokens": whole(),
}
"""What the fields that are read may hold; of config.json, those of the same names."""

# How transformers computes and returns, and a bound that the model's own context is here.
_HARMLESS = "cache_config cache_implementation compile_config disable_compile early_stopping is_assistant low_memory"
_HARMLESS += " max_length max_time output_attentions output_hidden_states output_logits output_scores"
_HARMLESS += " prefill_chunk_size renormalize_logits return_dict_in_generate return_legacy_cache target_lookbehind"
_HARMLESS += " assistant_early_exit assistant_lookbehind transformers_version trust_remote_code use_cache"
_UNSAID = {*DECLARED, *_HARMLESS.split()}


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """What a checkpoint's files say of generation; None, or nothing, where they say nothing.

    Ends, suppressed tokens, bad words and stop strings hold for every request, whatever its `SamplingParams`; the
    others are defaults of those.

    Attributes:
      eos_token_ids: the tokens that end a text: those of generation_config.json, of config.json and the tokenizer's.
      bos_token_id, pad_token_id: from generation_config.json, else from config.json.
      temperature: 0.0 (greedy) where `do_sample` is stated to be false.
      top_p, top_k, min_p, repetition_penalty: as stated.
      max_tokens: `max_new_tokens`.
      suppress_tokens: tokens that are never made.
      begin_suppress_tokens: tokens that are not the first to be made.
      bad_words: sequences of tokens that are never made.
      stop_strings: texts that end a text.
    """

    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()


def generation_defaults(
    directory: Path, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> GenerationDefaults:
    """What generation_config.json, which may be absent, config.json and the tokenizer say.

    A setting that is neither read nor without effect is said once, in a warning.

    Args:
      directory: of the checkpoint.
      tokenizer: whose end of text is one, too.
      vocab_size: the model's, which ids lie within; None is any.

    Raises:
      CheckpointError: a value of the wrong type or out of range, naming the file.
    """
    file = Fields(read_optional(directory / FILE), DECLARED, str(directory / FILE))
    config = directory / "config.json"
    fallback = Fields(text_part(read_object(config), str(config)).values, DECLARED, str(config))
    for fields, name in ((file, "eos_token_id"), (fallback, "eos_token_id"), *((file, name) for name in _NEVER)):
        beyond = [token for token in _ids(fields, name) if vocab_size is not None and token >= vocab_size]
        if beyond:
            raise CheckpointError(f"{fields.file}: {name} has {beyond[0]}, expected ids below vocab_size {vocab_size}")
    ends = [*_ids(file, "eos_token_id"), *_ids(fallback, "eos_token_id")]
    end = None if tokenizer is None else tokenizer.eos_token_id
    if end is not None and (vocab_size is None or end < vocab_size):
        ends.append(end)
    bad_words = file.get("bad_words_ids", ())
    not_read = [name for name in file if _changes_something(name, file.values[name])]
    if not_read:
        warnings.warn(f"{file.file}: {listing(not_read)} not read here; texts are made without", stacklevel=3)
    return GenerationDefaults(
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=next(iter(_ids(file, "bos_token_id") or _ids(fallback, "bos_token_id")), None),
        pad_token_id=next(iter(_ids(file, "pad_token_id") or _ids(fallback, "pad_token_id")), None),
        suppress_tokens=_ids(file, "suppress_tokens"),
        begin_suppress_tokens=_ids(file, "begin_suppress_tokens"),
        bad_words=bad_words,
        stop_strings=file.get("stop_strings", ()),
        temperature=file.get("temperature") if file.get("do_sample", True) else 0.0,
        max_tokens=file.get("max_new_tokens"),
        **{name: file.get(name) for name in ("top_p", "top_k", "min_p", "repetition_penalty")},
    )


def _ids(fields: Fields, name: str) -> tuple[int, ...]:
    return tuple(token for token in fields.get(name, ()) if token >= 0)


def _changes_something(name: str, value: Any) -> bool:
    if name in _UNSAID or name.startswith("_") or value in (None, False, [], {}):
        return False
    return value not in _WITHOUT_EFFECT.get(name, ())
