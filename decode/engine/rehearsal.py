"""Programs compiled before there is anything to run: several at once, without a pool and even without weights."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import numpy as np

from .runner import Runner
from .slots import READ

_THREADS = min(8, os.cpu_count() or 1)


class Rehearsal(Runner):
    """Stands in for a runner: it compiles what it is told to run, and every token that it makes is the same one.

    A call that comes later finds its program compiled: JAX keeps them by what they compute and by the shapes, dtypes
    and shardings of their arguments.

    Args:
      runner: whose programs they are; its model's parameters may be `jax.ShapeDtypeStruct`s.
      token: that is made; best one that ends no text.
    """

    def __init__(self, runner: Runner, token: int = 0):
        vars(self).update(vars(runner))
        self._token = token
        self.model = dataclasses.replace(runner.model, params=jax.tree.map(_abstract, runner.model.params))
        held = runner.pages, runner.draft_pages, runner.state
        self.pages, self.draft_pages, self.state = jax.tree.map(_abstract, held)
        self._compiled: set[Any] = set()
        self._running: set[Future] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "ridgeline-compile")

    def __enter__(self) -> "Rehearsal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        """Wait for what is being compiled; after an exception, Ctrl-C for one, begin no more."""
        self._threads.shutdown(wait=kind is None, cancel_futures=kind is not None)
        if kind is None:
            self._wait(0)

    def _run(self, program: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Have a jitted function compiled for such arguments; what stands for its results."""
        out = self._compile(program, args, kwargs)
        if program not in READ:
            return out
        made = jax.tree.map(lambda x: jax.device_put(np.full(x.shape, self._token, x.dtype)), out[READ[program]])
        return (*out[: READ[program]], made, *out[READ[program] + 1 :])

    def _compile(self, program: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        key = program, jax.tree.structure((args, kwargs)), tuple(map(_key, jax.tree.leaves((args, kwargs))))
        lowered = program.lower(*args, **kwargs)
        if self.model.mesh is not None:  # which alone makes known where results lie
            compiled = lowered.compile()
            return jax.tree.map(
                lambda out, at: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=at),
                lowered.out_info,
                compiled.output_shardings,
            )
        if key not in self._compiled:
            self._compiled.add(key)
            self._wait(2 * _THREADS)
            self._running.add(self._threads.submit(lowered.compile))
        return jax.tree.map(lambda out: jax.ShapeDtypeStruct(out.shape, out.dtype), lowered.out_info)

    def _wait(self, most: int) -> None:
        """Go on once no more than so many programs wait or are being compiled."""
        while len(self._running) > most:
            done, self._running = wait(self._running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()


def _abstract(x: Any) -> jax.ShapeDtypeStruct:
    # Arrays that were put nowhere in particular are other arguments to JAX than those that were put somewhere.
    at = x.sharding if getattr(x, "committed", True) else None
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)


def _key(leaf: Any) -> Any:
    is_array = isinstance(leaf, jax.ShapeDtypeStruct | jax.Array | np.ndarray)
    return (leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) if is_array else leaf
