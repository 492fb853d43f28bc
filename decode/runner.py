"""The device side of a batch: a cache, what sampling asks for, and the dispatches that advance both."""

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ..model.config import ModelConfig
from ..model.loading import Model
from ..model.params import Params
from . import buckets
from .cache import KVCache, init_cache
from .extend import extend
from .loop import decode_steps, sample_first
from .prefill import prefill
from .sampling.draw import SampleLogprobs
from .sampling.params import SamplingParams
from .sampling.state import make_sampling_state

Texts = Sequence[Sequence[int] | Int[np.ndarray, "_"]] | Int[np.ndarray, "_ _"]
"""Token ids of each row."""

Sampled = tuple[Int[Array, "N B"], SampleLogprobs | None]
"""New tokens of every row, step by step, and their log-probabilities where the batch asks for any; on the device."""


class Runner:
    """Drives the programs of a batch of rows; knows no text and no policy.

    Args:
      model: as `load_model` returns it.
      rows: how many run together; rounded up to what the mesh divides.
      max_length: positions of the cache, a row.
      kv_dtype: of cached keys and values, as `init_cache` takes it.

    Attributes:
      cache: the rows' cache.
      reads_again: whether `decode` wants the rows' texts: some layer has LongRoPE.
    """

    def __init__(self, model: Model, rows: int, max_length: int, *, kv_dtype: jax.typing.DTypeLike | None = None):
        data = 1 if model.mesh is None else model.mesh.shape["data"]
        self.model = model
        longrope = {layer.rope for layer in model.config.layers if layer.rope.kind == "longrope"}
        self._borders = {rope.original_max_position for rope in longrope}
        self.reads_again = bool(longrope)
        self.cache = init_cache(model.config, -(-rows // data) * data, max_length, mesh=model.mesh, kv_dtype=kv_dtype)

    def begin(self, texts: Texts, max_lengths: Sequence[int]) -> None:
        """Empty the cache for rows that will begin with these texts.

        Args:
          texts: what `prefill` or `all_logits` will run; their lengths are those that length-dependent RoPE kinds see
            until the rows are longer, so that chunks agree.
          max_lengths: positions at which each row is full; rows past those given have no room at all.
        """
        self.cache = self.cache.replace(
            lengths=self._rows([]), max_lengths=self._rows(max_lengths), contexts=self._rows(list(map(len, texts)))
        )

    def sample_with(self, params: Sequence[SamplingParams], prompts: Texts, seeds: Sequence[int]) -> None:
        """Draw the rows' tokens as each asks for."""
        self.state, self.plan = make_sampling_state(
            params,
            prompts,
            seeds,
            self.model.config.vocab_size,
            self.model.generation.eos_token_ids,
            batch_size=self.cache.batch_size,
            mesh=self.model.mesh,
        )

    def prefill(self, prompts: Texts) -> Float[Array, "B V"]:
        """Run the prompts, in chunks where they are long; the logits after the last token of each."""
        logits = None
        for _, tokens, new in self._chunks(prompts, None):
            chunk, self.cache = prefill(self.model.params, self.model.config, tokens, new, self.cache)
            settle(self.model, chunk)
            logits = chunk if logits is None else _newer(new, chunk, logits)
        return logits

    def all_logits(self, texts: Texts, width: int) -> Iterator[tuple[int, Float[Array, "B T V"]]]:
        """Run the texts `width` tokens at a time: the first token's place, and the logits after each of them."""
        for start, tokens, new in self._chunks(texts, width):
            logits, self.cache = _prefill_all(self.model.params, self.model.config, tokens, new, self.cache)
            settle(self.model, logits)
            yield start, logits

    def first(self, logits: Float[Array, "B V"]) -> Sampled:
        """Sample the token that follows the prompts."""
        made, logprobs, self.tokens, self.state = sample_first(logits, self.state, self.cache.lengths, self.plan)
        return made, logprobs

    def decode(self, texts: Texts = (), steps: int = buckets.DECODE_STEPS) -> Sampled:
        """Make the next tokens of every row, in one dispatch.

        Args:
          texts: of the rows that go on, with the tokens made so far. LongRoPE changes all frequencies where a row
            outgrows the pre-training context: the row is read again there, as `transformers` does (`Phi3ForCausalLM`),
            and steps are single ones just before. Without texts rows that outgrow it keep their keys.
          steps: to make.
        """
        cached = [len(text) - 1 for text in texts]  # the last token is not, yet
        if any(border in cached for border in self._borders):
            self._read_again([text[:-1] if n in self._borders else [] for n, text in zip(cached, texts, strict=True)])
        if any(0 <= n < border < n + steps for border in self._borders for n in cached):
            steps = 1
        made, logprobs, self.tokens, self.cache, self.state = decode_steps(
            self.model.params, self.model.config, self.tokens, self.cache, self.state, self.plan, steps=steps
        )
        settle(self.model, made)
        return made, logprobs

    def _read_again(self, texts: Texts) -> None:
        """Run rows anew as if they were a token longer; those of no text stay as they are."""
        again = np.array([len(text) for text in texts] + [0] * (self.cache.batch_size - len(texts)), np.int32)
        self.cache = self.cache.replace(
            lengths=jnp.where(again > 0, 0, self.cache.lengths),
            contexts=jnp.where(again > 0, again + 1, self.cache.contexts),
        )
        self.prefill(texts)

    def _rows(self, values: Sequence[int]) -> Int[Array, "B"]:
        """One value a row, 0 past those given, placed as the cache's rows are."""
        padded = np.zeros(self.cache.batch_size, np.int32)
        padded[: len(values)] = values
        return jax.device_put(padded, None if self.model.mesh is None else self.cache.lengths.sharding)

    def _chunks(
        self, texts: Texts, width: int | None
    ) -> Iterator[tuple[int, Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]]:
        """The texts' tokens chunk by chunk, right-padded, with the place of the first and how many of each row count.

        Chunks have the given width, or that of the bucket that holds what is left.
        """
        longest, start = max(map(len, texts)), 0
        while start < longest:
            columns = width or buckets.prefill_bucket(min(longest - start, buckets.PREFILL_CHUNK))
            tokens = np.zeros((self.cache.batch_size, columns), np.int32)
            new = np.zeros(self.cache.batch_size, np.int32)
            for row, text in enumerate(texts):
                part = text[start : start + columns]
                tokens[row, : len(part)], new[row] = part, len(part)
            yield start, tokens, new
            start += columns


def settle(model: Model, out: jax.Array) -> None:
    """Wait, on a mesh of CPU devices: collective programs that are queued there wait for each other for ever."""
    if model.mesh is not None and model.mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(out)


@jax.jit
def _newer(new: Int[Array, "B"], logits: Float[Array, "B V"], old: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """The logits of the last chunk that had tokens of a row."""
    return jnp.where(new[:, None] > 0, logits, old)


@functools.partial(jax.jit, static_argnames="config", donate_argnames="cache")
def _prefill_all(
    params: Params, config: ModelConfig, tokens: Int[Array, "B T"], new: Int[Array, "B"], cache: KVCache
) -> tuple[Float[Array, "B T V"], KVCache]:
    """`prefill` with the logits after every token."""
    return extend(params, config, tokens, new, cache, logits="all")
