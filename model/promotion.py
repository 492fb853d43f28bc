"""Which rules of promotion hold inside: the project's own, whatever a caller has set for his code."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P, R = ParamSpec("P"), TypeVar("R")


def own_promotion(function: Callable[P, R]) -> Callable[P, R]:
    """`function` where dtypes and ranks are promoted, whatever `jax_numpy_dtype_promotion` and its like forbid."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return call
