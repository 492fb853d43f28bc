"""transformers beside us: the same weights, prompts and dtype, eager and compiled, one turn at a time.

The loop around its forward pass is leaner than its `generate`: logits of the last position alone, the likeliest token,
no stopping criteria. torch and transformers are imported when a comparison is asked for, not before.
"""

import copy
import importlib.util
import inspect
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..model.loading import BUNDLED
from .environment import cores
from .steps import Steps
from .subject import Subject
from .timing import Turn

EAGER, COMPILED = "transformers eager", "transformers compiled"
PEERS = (EAGER, COMPILED)


def check_installed() -> None:
    """RuntimeError where torch or transformers are missing."""
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"--compare needs {' and '.join(missing)}: pip install 'ridgeline[parity]'")


def load(subject: Subject, directory: Path | None) -> Any:
    """The subject in transformers: its own weights, or random ones, which are written to a directory in files.

    Both programs then have these weights: transformers as it made them, Ridgeline as it reads them.
    """
    torch, transformers = _import()
    dtype = getattr(torch, subject.config.dtype)
    if directory is None:
        own = BUNDLED.get(subject.name) or Path(subject.name).expanduser()
        model = transformers.AutoModelForCausalLM.from_pretrained(own, dtype=dtype, local_files_only=True)
    else:
        (directory / "config.json").write_text(json.dumps(dict(subject.hf)))
        torch.manual_seed(0)
        # Norms at one and biases at zero, as transformers makes them; logits of random weights have clear winners.
        config = transformers.AutoConfig.from_pretrained(directory)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.save_pretrained(directory, max_shard_size="512MB")
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return model.eval().requires_grad_(False).to(device)


def _import() -> tuple[Any, Any]:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch
    import transformers

    torch.set_num_threads(cores())  # as many as XLA has
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return torch, transformers


class Peer:
    """transformers, one way or the other.

    Args:
      model: a causal language model of transformers.
      compiled: with `torch.compile` and a static cache, each shape for itself and, on a CPU, with weights frozen into
        the program; otherwise eager, with the cache that grows.
    """

    def __init__(self, model: Any, compiled: bool):
        self.torch, self.transformers = _import()
        self.model, self.compiled = model, compiled
        self.name = COMPILED if compiled else EAGER
        self.takes_positions = "cache_position" in inspect.signature(model.forward).parameters  # before 5.0

    def prefill_turn(self, prompts: np.ndarray) -> Turn:
        """Seconds from prompts to their first tokens on the host. A static cache is made beforehand."""
        held: dict[str, Any] = {}

        def turn() -> Mapping[str, float]:
            if self.compiled and not held:
                # Its own `generate` does not compile prefill; we do, since it is faster. The cache must exist before.
                held["forward"], held["cache"] = self._forward(), self._static_cache(prompts, prompts.shape[1] + 1)
            if self.compiled:
                held["cache"].reset()
            self._wait()
            started = time.perf_counter()
            cache = held["cache"] if self.compiled else self._dynamic_cache()
            forward = held["forward"] if self.compiled else self.model.forward
            self._next(forward, self._ids(prompts), cache, 0).tolist()
            return {self.name: time.perf_counter() - started}

        return turn

    def decode_turn(self, prompts: np.ndarray, steps: Steps) -> Turn:
        """Seconds a step after prompts of `steps.cached` tokens, as many steps as are timed of us."""
        held: dict[str, Any] = {}

        def turn() -> Mapping[str, float]:
            if not held:
                held["forward"], held["rewind"] = self._prepared(prompts, steps.capacity)
            forward = held["forward"]
            self._decode(forward, held["rewind"](), prompts[:, -1:], steps.cached, 1)
            cache = held["rewind"]()
            self._wait()
            started = time.perf_counter()
            self._decode(forward, cache, prompts[:, -1:], steps.cached, steps.count)
            return {self.name: (time.perf_counter() - started) / steps.count}

        return turn

    def greedy(self, prompts: np.ndarray, count: int) -> list[list[int]]:
        """The likeliest tokens after prompts, one after the other."""
        cached = prompts.shape[1]
        forward, rewind = self._prepared(prompts[:, :-1], cached + count)
        return self._decode(forward, rewind(), prompts[:, -1:], cached - 1, count)

    def _prepared(self, prompts: np.ndarray, capacity: int) -> tuple[Any, Callable[[], Any]]:
        """A forward pass for one token a row, and what returns a cache that holds the prompts alone."""
        if not self.compiled:
            cache = self._dynamic_cache()
            self._next(self.model.forward, self._ids(prompts), cache, 0)
            return self.model.forward, lambda: copy.deepcopy(cache)
        cache = self._static_cache(prompts, capacity)
        tensors = [tensor for layer in cache.layers for tensor in vars(layer).values() if self.torch.is_tensor(tensor)]
        numbers = [
            {name: value for name, value in vars(layer).items() if type(value) in (int, bool)} for layer in cache.layers
        ]
        kept = [tensor.clone() for tensor in tensors]

        def rewind() -> Any:  # in place, since the compiled program knows the tensors by their addresses
            for tensor, content in zip(tensors, kept, strict=True):
                tensor.copy_(content)
            for layer, values in zip(cache.layers, numbers, strict=True):
                vars(layer).update(values)
            return cache

        return self._forward(), rewind

    def _forward(self) -> Any:
        torch, on_gpu = self.torch, self.model.device.type == "cuda"
        limit = "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"
        setattr(torch._dynamo.config, limit, 1024)  # each shape is compiled for itself
        torch._inductor.config.freezing = not on_gpu
        if not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
            raise RuntimeError("torch.compile needs a C++ compiler on a CPU and finds no g++; install it, or set CXX")
        return torch.compile(self.model.forward, dynamic=False, mode="reduce-overhead" if on_gpu else None)

    def _dynamic_cache(self) -> Any:
        return self.transformers.DynamicCache(config=self.model.config)

    def _static_cache(self, prompts: np.ndarray, capacity: int) -> Any:
        """A static cache that holds prompts."""
        cache = self.transformers.StaticCache(config=self.model.config, max_cache_len=capacity)
        self._next(self.model.forward, self._ids(prompts), cache, 0)
        return cache

    def _ids(self, tokens: np.ndarray) -> Any:
        return self.torch.from_numpy(tokens.astype(np.int64)).to(self.model.device)

    def _next(self, forward: Any, ids: Any, cache: Any, start: int) -> Any:
        """The likeliest token after each row, [batch, 1]."""
        places = {}
        if self.takes_positions:
            places["cache_position"] = self.torch.arange(start, start + ids.shape[1], device=ids.device)
        with self.torch.no_grad():
            out = forward(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1, **places)
            return out.logits[:, -1].argmax(-1, keepdim=True)

    def _decode(self, forward: Any, cache: Any, tokens: np.ndarray, start: int, count: int) -> list[list[int]]:
        ids, made = self._ids(tokens), []
        for step in range(count):
            ids = self._next(forward, ids, cache, start + step)
            made.append(ids)
        return self.torch.cat(made, dim=1).tolist()

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            self.torch.cuda.synchronize()
