"""What public functions are given, checked where it comes in: errors name the argument, its value and what it may be.

Types are checked here, and that sizes are no larger than programs count; what a value means is its function's to check.
"""

import functools
import inspect
import numbers
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from .config import ModelConfig
from .fields import HALF, LARGEST, shortened

_LONGEST = 255  # characters of a file's name

Kind = Callable[[str, Any], None]
"""Takes the argument's name and value; raises TypeError or ValueError."""

_SERVES = {
    "max_new_tokens": "max_tokens",
    "max_length": "max_tokens, which counts new tokens alone",
    "min_new_tokens": "min_tokens",
    "do_sample": "temperature, which is 0 where do_sample is False",
    "best_of": "n, and the logprobs of each sample",
    "num_return_sequences": "n",
    "num_beams": "beam_search, with beam_width",
    "use_beam_search": "beam_search",
    "eos_token_id": "stop_token_ids",
    "stop_strings": "stop",
    "bad_words_ids": "bad_words, or a constraint",
    "sequence_bias": "logit_bias",
    "logits_processors": "adjust of generate, or a constraint",
    "logits_processor": "adjust of generate, or a constraint",
    "guided_decoding": "constraint",
    "structured_outputs": "constraint",
    "no_repeat_ngram_size": "constraint, which may forbid what was there, or repetition_penalty",
    "typical_p": "top_p or min_p",
    "truncate_prompt_tokens": "token ids, cut as they are to be",
    "detokenize": "the tokens of an output, whose text need not be read",
    "spaces_between_special_tokens": "skip_special_tokens",
    "streamer": "stream, or callback",
    "input_ids": "prompts, which may be token ids",
    "inputs": "prompts, which may be token ids",
    "prompt_token_ids": "prompts, which may be token ids",
    "messages": "prompts, which may be the messages of a chat",
    "sampling_params": "sampling",
    "generation_config": "sampling, whose defaults are those of generation_config.json",
    "use_tqdm": "progress",
}
"""What does here what vLLM and transformers have other names for."""

_SAMPLING = ("max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "stop", "logprobs")
"""Fields of `SamplingParams` that one may look for in `generate`."""


def unknown_argument(function: str, name: str, known: Any) -> TypeError:
    """The error for an argument that a function does not have, with what serves in its place."""
    serves = _SERVES.get(name)
    if serves is None and name in _SAMPLING:
        serves = f"sampling, with SamplingParams({name}=...)"
    remedy = f"use {serves}" if serves else f"it has {', '.join(known)}"
    return TypeError(f"{function} has no argument {name!r}; {remedy}")


def arguments(**kinds: Kind) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Check a function's arguments by their names before it runs; under jit, while it is traced."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        signature, name = inspect.signature(function), function.__qualname__.removesuffix(".__init__")
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature.parameters.values())

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            for unknown in () if takes_any else kwargs.keys() - signature.parameters.keys():
                raise unknown_argument(name, unknown, [p for p in signature.parameters if p != "self"])
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise TypeError(f"{name}: {error}") from None
            for argument, kind in kinds.items():
                if argument in given:
                    kind(f"{name}: {argument}", given[argument])
            return function(*args, **kwargs)

        return checked

    return decorate


def _wrong(name: str, value: Any, allowed: str) -> TypeError:
    kind = type(value).__name__
    kind = "array" if hasattr(value, "dtype") else kind
    shown = kind if hasattr(value, "dtype") or isinstance(value, Mapping) else f"{shortened(value)}, of type {kind}"
    return TypeError(f"{name} is {shown}; it must be {allowed}")


def whole(name: str, value: Any) -> None:
    """An integer, of any type, that int32 holds."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise _wrong(name, value, "a whole number")
    if abs(value) > LARGEST:
        raise ValueError(f"{name} is {shortened(value)}; it is counted in 32 bits, so that {LARGEST:,} is the most")


def flag(name: str, value: Any) -> None:
    """A boolean."""
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, value, "True or False")


def function(count: int) -> Kind:
    """Something to call with so many arguments."""

    def check(name: str, value: Any) -> None:
        if not callable(value):
            raise _wrong(name, value, "a function")
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # as of some builtins
            return
        try:
            signature.bind(*range(count))
        except TypeError as error:
            raise TypeError(
                f"{name} is called with {count} arguments, and this function takes others: {error}"
            ) from None

    return check


def text(name: str, value: Any) -> None:
    """A string."""
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")


def number(name: str, value: Any) -> None:
    """A finite number."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise _wrong(name, value, "a number")
    if not abs(value) < 1e300:
        raise ValueError(f"{name} is {shortened(value)}; it must be finite")


def instance(*types: type, hint: str = "") -> Kind:
    """An object of a class, and perhaps what makes one."""
    allowed = " or ".join(one.__name__ for one in types) + (f", {hint}" if hint else "")

    def check(name: str, value: Any) -> None:
        if not isinstance(value, types):
            raise _wrong(name, value, allowed)

    return check


def optional(kind: Kind) -> Kind:
    """What a kind allows, or None."""
    return lambda name, value: None if value is None else kind(name, value)


def array(letters: str, axes: str) -> Kind:
    """An array of some kinds of dtype ("i", "f") with so many axes, of which `...` is any number."""
    named = axes.split()
    words = {"iu": "integers", "f": "floats"}[letters]

    def check(name: str, value: Any) -> None:
        if not isinstance(value, np.ndarray | np.generic | jax.Array):
            raise _wrong(name, value, f"an array of {words}, [{', '.join(named)}]")
        shape, dtype = value.shape, value.dtype
        is_kind = jax.dtypes.issubdtype(dtype, np.integer if letters == "iu" else np.floating)
        if not is_kind or (len(shape) != len(named) if "..." not in named else len(shape) < len(named) - 1):
            size = ", ".join(map(str, shape))
            raise ValueError(f"{name} is {dtype} [{size}]; it must be an array of {words}, [{', '.join(named)}]")

    return check


def path(name: str, value: Any) -> None:
    """Of a file or directory."""
    if not isinstance(value, str | os.PathLike):
        raise _wrong(name, value, "a path")
    text = os.fsdecode(os.fspath(value)) if isinstance(value, os.PathLike) else value
    too_long = max(map(len, text.split(os.sep))) > _LONGEST
    if not text or too_long or "\0" in text or HALF.search(text):
        raise ValueError(f"{name} is {shortened(text)}; no file can have that name")


def dtype(name: str, value: Any) -> None:
    """The name of a dtype, or one itself."""
    try:
        jax.numpy.dtype(value)
    except (TypeError, ValueError):
        raise _wrong(name, value, "a dtype, such as 'float32'") from None


def sequence(name: str, value: Any) -> None:
    """Several things, in order."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise _wrong(name, value, "a sequence")


seams = {"residual": optional(function(2)), "component": optional(function(3))}
config = instance(ModelConfig, hint="such as model.config")


mesh = optional(instance(Mesh, hint="as make_mesh returns it"))


def parameters(name: str, value: Any) -> None:
    """A model's tree of parameters."""
    if not isinstance(value, Mapping) or not {"embedding", "layers", "final_norm"} <= value.keys():
        raise _wrong(name, value, "a model's parameters, as param_specs lists them, such as model.params")


def known_ids(jitted: Callable[..., Any], static: Sequence[str]) -> Callable[..., Any]:
    """Refuse token ids that the vocabulary does not have, where to look at them is not to wait for a device.

    That is of arrays on the host and on CPUs. Under a trace and on accelerators, ids are the caller's.

    Args:
      jitted: a program of params, config, tokens and what follows.
      static: the names of its static arguments.
    """

    name, is_config = jitted.__name__, instance(ModelConfig, hint="such as model.config")

    @functools.wraps(jitted)
    def call(params: Any, config: Any, tokens: Any, *args: Any, **kwargs: Any) -> Any:
        parameters(f"{name}: params", params)
        is_config(f"{name}: config", config)
        if not hasattr(tokens, "dtype"):
            raise _wrong(f"{name}: tokens", tokens, "an array of integers")
        _check_ids(name, config.vocab_size, tokens, args[0] if args else kwargs.get("lengths"))
        try:
            return jitted(params, config, tokens, *args, **kwargs)
        except OverflowError as error:  # of an integer where an array belongs
            raise TypeError(f"{name}: {error}") from None
        except ValueError as error:
            if "hashable" not in str(error):
                raise
            given = inspect.signature(jitted).bind(params, config, tokens, *args, **kwargs).arguments
            wrong = [argument for argument in static if not _is_hashable(given.get(argument))]
            raise TypeError(f"{name}: {', '.join(wrong)} cannot be hashed, as what is static has to be") from error

    call.lower, call._cache_size = jitted.lower, jitted._cache_size
    return call


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


@jax.transfer_guard("allow")
def _check_ids(function: str, vocab_size: int, tokens: Any, lengths: Any) -> None:
    if not _is_at_hand(tokens) or tokens.dtype.kind not in "iu" or not tokens.size:
        return
    ids = np.asarray(tokens)
    if 0 <= ids.min() and ids.max() < vocab_size:
        return
    if ids.ndim == 2 and _is_at_hand(lengths) and lengths.shape == ids.shape[:1]:  # what pads a row does not count
        ids = np.where(np.arange(ids.shape[1]) < np.asarray(lengths)[:, None], ids, 0)
    for wrong in ids[(ids < 0) | (ids >= vocab_size)]:
        raise ValueError(f"{function}: tokens has id {wrong}; the vocabulary is 0 to {vocab_size - 1}")


def _is_at_hand(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer) or not isinstance(value, np.ndarray | jax.Array):
        return False
    if isinstance(value, np.ndarray):
        return True
    return value.is_fully_addressable and all(device.platform == "cpu" for device in value.devices())
