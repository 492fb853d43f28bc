"""Programs that consume their cache, and leave it where JAX is to differentiate or map over them."""

import functools
from collections.abc import Callable
from typing import Any

import jax


def jit_consuming(
    function: Callable[..., Any], *, static_argnames: str | tuple[str, ...], donate_argnames: str | tuple[str, ...]
) -> Callable[..., Any]:
    """`jax.jit` that donates, but where an argument is being traced: a derivative is made of what went in and out.

    An outer `jax.jit` decides itself what it donates, so that nothing is lost there.
    """
    consuming = jax.jit(function, static_argnames=static_argnames, donate_argnames=donate_argnames)
    keeping = jax.jit(function, static_argnames=static_argnames)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        is_traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((args, kwargs)))
        return (keeping if is_traced else consuming)(*args, **kwargs)

    call.lower, call._cache_size = consuming.lower, consuming._cache_size
    return call
