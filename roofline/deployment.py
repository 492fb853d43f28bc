"""A model as it lies on devices: in which numbers, over how many of them, and what that takes of each one's memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from ..model.config import DTYPES, ModelConfig
from ..model.params import ParamSpec, param_name, param_shardings, param_specs
from ..sharding.mesh import AXES


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a quantised weight is stored; the matrices of the layers are, embeddings, norms and biases are not.

    Attributes:
      bits: an element.
      group: elements along the input that share a scale; None is all of them (a scale an output channel).
      scale_bytes: a scale.
    """

    bits: int
    group: int | None
    scale_bytes: int

    def nbytes(self, outputs: int, inputs: int) -> int:
        """Bytes of a matrix of outputs x inputs, scales included."""
        groups = 1 if self.group is None else math.ceil(inputs / self.group)
        return math.ceil(outputs * inputs * self.bits / 8) + outputs * groups * self.scale_bytes


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(bits=8, group=None, scale_bytes=4),
    "fp8": Scheme(bits=8, group=None, scale_bytes=4),
    "int4": Scheme(bits=4, group=128, scale_bytes=2),
    "int4-64": Scheme(bits=4, group=64, scale_bytes=2),
    "int4-32": Scheme(bits=4, group=32, scale_bytes=2),
}
"""Weight-only quantisation: float32 scales an output channel, 16-bit scales a group (symmetric, no zero points)."""

WEIGHT_FORMATS = (*DTYPES, *SCHEMES)
KV_FORMATS = (*DTYPES, "int8", "fp8")
_KV_SCALE_BYTES = 4  # one float32 a token and head, for k and for v


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model in given formats on a given number of devices. All sizes are those of one device.

    Attributes:
      config: the model; its `dtype` is that of activations, and of whatever the next two leave as it is. KV heads are
        replicated here where the devices outnumber them.
      weights: a key of `SCHEMES` for the matrices of the layers, or a dtype for all parameters and activations.
      kv: of the KV cache, one of `KV_FORMATS`; "int8" and "fp8" bring a float32 scale a token and head.
      tensor: devices that share every layer.
      page_size: positions a page of the cache.

    Raises:
      ValueError: a format that is not known, a size that is not positive, or a model that so many devices cannot share.
    """

    config: ModelConfig
    weights: str | None = None
    kv: str | None = None
    tensor: int = 1
    page_size: int = 64

    def __post_init__(self):
        for name, known in (("weights", WEIGHT_FORMATS), ("kv", KV_FORMATS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name} {value!r} is not known; known: {', '.join(known)}")
        for name in ("tensor", "page_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        config = self.config if self.weights in (None, *SCHEMES) else self.config.replace(dtype=self.weights)
        object.__setattr__(self, "config", config.replicate_kv_heads(self.tensor))
        _ = self._local_parameters  # refuses what the devices do not divide

    @property
    def kv_heads(self) -> int:
        """KV heads on one device."""
        return self.config.num_kv_heads // self.tensor

    @functools.cached_property
    def _local_parameters(self) -> tuple[tuple[str, ParamSpec, tuple[int, ...]], ...]:
        """Each parameter's name, its spec, and its shape on one device."""
        mesh = AbstractMesh((1, 1, self.tensor), AXES)
        shardings = jax.tree.leaves(
            param_shardings(self.config, mesh), is_leaf=lambda leaf: isinstance(leaf, NamedSharding)
        )
        specs = jax.tree_util.tree_leaves_with_path(param_specs(self.config))
        return tuple(
            (param_name(path), spec, sharding.shard_shape(spec.shape))
            for (path, spec), sharding in zip(specs, shardings, strict=True)
        )

    @functools.cached_property
    def parameter_bytes(self) -> int:
        """Of all parameters, scales included."""
        return sum(self._nbytes(spec, shape) for _, spec, shape in self._local_parameters)

    @functools.cached_property
    def matrix_elements(self) -> int:
        """Elements of the matrices of the layers, each multiplied once a token."""
        return sum(math.prod(shape) for _, spec, shape in self._local_parameters if _is_layer_matrix(spec))

    @functools.cached_property
    def embedding_bytes(self) -> int:
        """Of the embedding matrix."""
        return next(self._nbytes(spec, shape) for name, spec, shape in self._local_parameters if name == "embedding")

    def _nbytes(self, spec: ParamSpec, shape: tuple[int, ...]) -> int:
        if self.weights not in SCHEMES or not _is_layer_matrix(spec):
            return math.prod(shape) * itemsize(spec.dtype)
        # Products into the residual stream contract all axes but the first, the others the last alone.
        outputs = shape[0] if spec.axes[0] == "embed" else math.prod(shape[:-1])
        return SCHEMES[self.weights].nbytes(outputs, math.prod(shape) // outputs)

    @property
    def kv_bytes_per_token_and_layer(self) -> int:
        kv = self.kv or self.config.dtype
        scale = 0 if kv in DTYPES else _KV_SCALE_BYTES
        return 2 * self.kv_heads * (self.config.head_dim * itemsize(kv) + scale)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return self.config.num_layers * self.kv_bytes_per_token_and_layer

    def cache_bytes(self, batch: int, length: int) -> int:
        """Of the keys and values of a cache: every layer has room for every position, windows or not, in whole pages.

        Args:
          batch: rows.
          length: positions a row.
        """
        return batch * math.ceil(length / self.page_size) * self.page_size * self.kv_bytes_per_token

    def largest_batch(self, memory: int | float, length: int) -> int:
        """Most rows of `length` positions whose cache fits beside the weights in so many bytes; 0 if none does."""
        return max(0, int((memory - self.parameter_bytes) // self.cache_bytes(1, length)))

    def longest_context(self, memory: int | float, batch: int) -> int:
        """Most positions a row, in whole pages, at which `batch` rows fit; at most the model's `max_position`."""
        pages = int((memory - self.parameter_bytes) // self.cache_bytes(batch, 1))
        return max(0, min(pages * self.page_size, self.config.max_position))


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return 1 if dtype == "fp8" else jnp.dtype(dtype).itemsize


def _is_layer_matrix(spec: ParamSpec) -> bool:
    return spec.init == "normal" and "vocab" not in spec.axes
