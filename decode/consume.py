"""Programs that consume their cache, and leave it where JAX is to differentiate or map over them."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax

from ..model.arguments import known_ids


def jit_consuming(
    function: Callable[..., Any], *, static_argnames: str | tuple[str, ...], donate_argnames: str | tuple[str, ...]
) -> Callable[..., Any]:
    """`jax.jit` that donates, but where an argument is being traced: a derivative is made of what went in and out.

    An outer `jax.jit` decides itself what it donates, so that nothing is lost there. Of a function of params, config
    and tokens; ids that the vocabulary does not have are refused as `known_ids` does.
    """
    consuming = jax.jit(function, static_argnames=static_argnames, donate_argnames=donate_argnames)
    keeping = jax.jit(function, static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        if is_traced:
            return keeping(*args, **kwargs)
        with telling_what_was_consumed(function.__name__):
            return consuming(*args, **kwargs)

    call.lower, call._cache_size = consuming.lower, consuming._cache_size
    static = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
    return known_ids(call, static)


@contextlib.contextmanager
def telling_what_was_consumed(function: str) -> Iterator[None]:
    """Say in words that a cache was given away before."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if "deleted" not in str(error):
            raise
        raise ValueError(
            f"{function}: the cache was consumed by an earlier call, as its memory is used again; go on with the one "
            "that the call returned"
        ) from error
