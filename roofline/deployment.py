"""A model as it lies on devices: in which numbers, over how many of them, and what that takes of each one's memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from ..model.config import DTYPES, ModelConfig
from ..model.params import Params, ParamSpec, float_specs, param_name, param_specs, spec_shardings
from ..model.schemes import SCHEMES, Quantization
from ..sharding.mesh import AXES

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
        config = self.config
        if self.weights in SCHEMES:
            config = config.replace(quantization=Quantization(SCHEMES[self.weights]))
        elif self.weights is not None:
            config = config.replace(dtype=self.weights)
        object.__setattr__(self, "config", config.replicate_kv_heads(self.tensor))
        _ = self._stored  # refuses what the devices do not divide

    @property
    def kv_heads(self) -> int:
        """KV heads on one device."""
        return self.config.num_kv_heads // self.tensor

    def _local_sizes(self, specs: Params) -> dict[str, tuple[ParamSpec, int]]:
        """The spec of each parameter, and how many elements of it one device holds."""
        leaves = jax.tree_util.tree_leaves_with_path(specs)
        shardings = jax.tree.leaves(
            spec_shardings(specs, AbstractMesh((1, 1, self.tensor), AXES)),
            is_leaf=lambda leaf: isinstance(leaf, NamedSharding),
        )
        return {
            param_name(path): (spec, math.prod(sharding.shard_shape(spec.shape)))
            for (path, spec), sharding in zip(leaves, shardings, strict=True)
        }

    @functools.cached_property
    def _stored(self) -> dict[str, int]:
        """Bytes of each array of the parameters."""
        sizes = self._local_sizes(param_specs(self.config))
        return {name: size * jnp.dtype(spec.dtype).itemsize for name, (spec, size) in sizes.items()}

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters, scales included."""
        return sum(self._stored.values())

    @functools.cached_property
    def matrix_elements(self) -> int:
        """Elements of the matrices of the layers, each multiplied once a token."""
        sizes = self._local_sizes(float_specs(self.config))
        return sum(size for spec, size in sizes.values() if spec.in_axes and "vocab" not in spec.axes)

    @property
    def embedding_bytes(self) -> int:
        """Of the embedding matrix."""
        return self._stored["embedding"]

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
