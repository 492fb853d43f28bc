"""What a checkpoint asks of generation: where its texts end, what they never hold, how they are drawn."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .checkpoint.files import CheckpointError, listing, read_object, read_optional
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

_READ = "bad_words_ids begin_suppress_tokens bos_token_id do_sample eos_token_id max_new_tokens min_p pad_token_id"
_READ += " repetition_penalty stop_strings suppress_tokens temperature top_k top_p"
# How transformers computes and returns, and a bound that the model's own context is here.
_HARMLESS = "cache_config cache_implementation compile_config disable_compile early_stopping is_assistant low_memory"
_HARMLESS += " max_length max_time output_attentions output_hidden_states output_logits output_scores"
_HARMLESS += " prefill_chunk_size renormalize_logits return_dict_in_generate return_legacy_cache target_lookbehind"
_HARMLESS += " assistant_early_exit assistant_lookbehind transformers_version trust_remote_code use_cache"
_UNSAID = {*_READ.split(), *_HARMLESS.split()}


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


def generation_defaults(directory: Path, tokenizer: Tokenizer | None = None) -> GenerationDefaults:
    """What generation_config.json, which may be absent, config.json and the tokenizer say.

    A setting that is neither read nor without effect is said once, in a warning.

    Raises:
      CheckpointError: a value of the wrong type or out of range, naming the file.
    """
    file, config = _Settings(directory / FILE, read_optional(directory / FILE)), directory / "config.json"
    fallback = _Settings(config, text_part(read_object(config)))
    ends = [*file.ids("eos_token_id"), *fallback.ids("eos_token_id")]
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ends.append(tokenizer.eos_token_id)
    not_read = [name for name, value in file.stated.items() if _changes_something(name, value)]
    if not_read:
        warnings.warn(f"{file.path}: {listing(not_read)} not read here; texts are made without", stacklevel=3)
    temperature = file.number("temperature", 0.0)
    return GenerationDefaults(
        eos_token_ids=tuple(dict.fromkeys(ends)),
        bos_token_id=next(iter(file.ids("bos_token_id") or fallback.ids("bos_token_id")), None),
        pad_token_id=next(iter(file.ids("pad_token_id") or fallback.ids("pad_token_id")), None),
        suppress_tokens=file.ids("suppress_tokens"),
        begin_suppress_tokens=file.ids("begin_suppress_tokens"),
        bad_words=file.id_lists("bad_words_ids"),
        stop_strings=file.texts("stop_strings"),
        temperature=0.0 if file.stated.get("do_sample") is False else temperature,
        top_p=file.number("top_p", 0.0, 1.0, above=True),
        top_k=file.number("top_k", -1.0, integer=True),
        min_p=file.number("min_p", 0.0, 1.0),
        repetition_penalty=file.number("repetition_penalty", 0.0, above=True),
        max_tokens=file.number("max_new_tokens", 1.0, integer=True),
    )


def _changes_something(name: str, value: Any) -> bool:
    if name in _UNSAID or name.startswith("_") or value in (None, False, [], {}):
        return False
    return value not in _WITHOUT_EFFECT.get(name, ())


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of a file, which its errors name."""

    path: Path
    stated: Mapping[str, Any]

    def ids(self, name: str) -> tuple[int, ...]:
        """Token ids; -1 is none."""
        value = self.stated.get(name)
        values = value if isinstance(value, list) else [] if value in (None, -1) else [value]
        if not all(type(v) is int and v >= 0 for v in values):
            self._refuse(name, "a token id or a list of them")
        return tuple(values)

    def id_lists(self, name: str) -> tuple[tuple[int, ...], ...]:
        value = self.stated.get(name) or []
        rows = value if isinstance(value, list) else [value]
        if not all(isinstance(row, list) and row and all(type(v) is int and v >= 0 for v in row) for row in rows):
            self._refuse(name, "a list of lists of token ids")
        return tuple(map(tuple, rows))

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.stated.get(name) or []
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(v, str) and v for v in values):
            self._refuse(name, "a text or a list of them")
        return tuple(values)

    def number(
        self, name: str, low: float, high: float = math.inf, *, integer: bool = False, above: bool = False
    ) -> Any:
        """A number from `low`, or above it, to `high`."""
        value = self.stated.get(name)
        if value is None:
            return None
        whole = int(value) if integer and type(value) is float and value.is_integer() else value
        allowed = type(whole) in ((int,) if integer else (int, float))
        if not allowed or not (low < whole if above else low <= whole) or not whole <= high:
            kind = "an integer" if integer else "a number"
            self._refuse(name, f"{kind} from {low:g} to {high:g}{', not 0 itself' if above else ''}")
        return whole if integer else float(whole)

    def _refuse(self, name: str, expected: str) -> None:
        raise CheckpointError(f"{self.path}: {name} is {self.stated[name]!r}, expected {expected}")
