"""A model as it lies on devices: in which numbers, over how many of them, and what that takes of each one's memory."""

import bisect
import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from ..model import arguments
from ..model.config import DTYPES, ModelConfig
from ..model.kv_specs import KV_DTYPES, KVSpec, kv_specs, pages_per_row
from ..model.params import Params, ParamSpec, float_specs, kv_replicas, param_name, param_specs
from ..model.schemes import SCHEMES, Quantization
from ..sharding.mesh import AXES
from ..sharding.rules import named_sharding

WEIGHT_FORMATS = (*DTYPES, *SCHEMES)
KV_FORMATS = tuple(KV_DTYPES)


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model in given formats on a given number of devices. All sizes are those of one device.

    Attributes:
      config: the model; its `dtype` is that of activations, and of whatever the next two leave as it is.
      weights: a key of `SCHEMES` for the matrices of the layers, or a dtype for all parameters and activations.
      kv: of the KV cache, one of `KV_FORMATS`; "int8" and "fp8" bring a float32 scale a token and head.
      tensor: devices that share every layer.
      expert: groups of so many devices, which share out the experts of a layer and all else do alike.
      page_size: positions a page of the cache.
      routing: the fraction of tokens that each expert of a layer gets, as measured; None is the same for all.

    Raises:
      TypeError, ValueError: a format that is not known, a size that is not positive, or a model that so many devices
        cannot share.
    """

    config: ModelConfig
    weights: str | None = None
    kv: str | None = None
    tensor: int = 1
    page_size: int = 64
    routing: tuple[float, ...] | None = None
    expert: int = 1

    def __post_init__(self):
        arguments.config("Deployment: config", self.config)
        for name in ("tensor", "page_size"):
            arguments.whole(f"Deployment: {name}", getattr(self, name))
        for name, known in (("weights", WEIGHT_FORMATS), ("kv", KV_FORMATS)):
            value = getattr(self, name)
            arguments.optional(arguments.text)(f"Deployment: {name}", value)
            if value is not None and value not in known:
                raise ValueError(f"{name} {value!r} is not known; known: {', '.join(known)}")
        for name in ("tensor", "page_size", "expert"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        config = self.config
        experts = 0 if config.experts is None else config.experts.count
        if self.routing is not None and (len(self.routing) != experts or not all(0 <= p <= 1 for p in self.routing)):
            raise ValueError(f"routing is {self.routing}; it must be {experts} fractions, one an expert of a layer")
        if self.weights in SCHEMES:
            config = config.replace(quantization=Quantization(SCHEMES[self.weights]))
        elif self.weights is not None:
            config = config.replace(dtype=self.weights, quantization=None)
        object.__setattr__(self, "config", config)
        _ = self._stored  # refuses what the devices do not divide

    @property
    def devices(self) -> int:
        """That share the model."""
        return self.tensor * self.expert

    @property
    def kv_heads(self) -> int:
        """KV heads on one device, copies counted."""
        return self.config.num_kv_heads * kv_replicas(self.config, self.tensor) // self.tensor

    @property
    def q_per_kv(self) -> int:
        """Query heads of each of them."""
        return self.config.q_per_kv // kv_replicas(self.config, self.tensor)

    def _local_size(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> int:
        """Elements of an array that one device holds."""
        sharding = named_sharding(name, shape, axes, AbstractMesh((1, self.expert, self.tensor), AXES))
        return math.prod(sharding.shard_shape(shape))

    def _local_sizes(self, specs: Params) -> dict[str, tuple[ParamSpec, int]]:
        """The spec of each parameter, and how many elements of it one device holds."""
        named = ((param_name(path), spec) for path, spec in jax.tree_util.tree_leaves_with_path(specs))
        return {name: (spec, self._local_size(name, spec.shape, spec.axes)) for name, spec in named}

    @functools.cached_property
    def _stored(self) -> dict[str, int]:
        """Bytes of each array of the parameters."""
        sizes = self._local_sizes(param_specs(self.config, self.tensor))
        return {name: size * jnp.dtype(spec.dtype).itemsize for name, (spec, size) in sizes.items()}

    @property
    def parameter_bytes(self) -> int:
        """Of all parameters, scales included."""
        return sum(self._stored.values())

    @functools.cached_property
    def matrix_elements(self) -> int:
        """Elements of the matrices of the layers by which a token is multiplied, once each; of experts, its own."""
        sizes = self._local_sizes(float_specs(self.config, self.tensor)).values()
        matrices = [(spec, size) for spec, size in sizes if spec.in_axes and "vocab" not in spec.axes]
        routed, experts = sum(size for spec, size in matrices if "experts" in spec.axes), self.config.experts
        others = sum(size for _, size in matrices) - routed
        return others + (routed * experts.per_token // experts.count if routed else 0)

    def weight_bytes_read(self, tokens: int) -> int:
        """Of the parameters that a step of so many tokens reads: of experts, those that are expected to get any.

        Of E experts of which each token has k that is E * (1 - (1 - k / E) ** tokens), if all are as likely.
        """
        experts = self.config.experts
        if experts is None:
            return self.parameter_bytes
        fractions = self.routing or (experts.per_token / experts.count,) * experts.count
        idle = sum((1 - fraction) ** tokens for fraction in fractions) / experts.count
        return self.parameter_bytes - round(idle * self._expert_bytes)

    @functools.cached_property
    def _expert_bytes(self) -> int:
        """Of all routed experts."""
        specs = self._local_sizes(param_specs(self.config, self.tensor))
        return sum(self._stored[name] for name, (spec, _) in specs.items() if "experts" in spec.axes)

    @property
    def embedding_bytes(self) -> int:
        """Of the embedding matrix."""
        return self._stored["embedding"]

    @functools.cached_property
    def kv_bytes_by_layer(self) -> tuple[int, ...]:
        """What each layer keeps of one token."""

        def nbytes(spec: KVSpec) -> int:
            shape = spec.shape(pages=1, page_size=1)
            return self._local_size("cache", shape, spec.axes) * jnp.dtype(spec.dtype).itemsize

        layers = kv_specs(self.config, self.kv, self.tensor)
        return tuple(sum(map(nbytes, jax.tree.leaves(layer))) for layer in layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of one token, all layers."""
        return sum(self.kv_bytes_by_layer)

    def cache_bytes(self, batch: int, length: int) -> int:
        """Of the keys and values of a cache, in whole pages; layers with a window keep what it reaches.

        Args:
          batch: rows.
          length: positions a row.
        """
        layers = zip(self.config.layers, self.kv_bytes_by_layer, strict=True)
        held = sum(pages_per_row(layer.window, length, self.page_size) * kv for layer, kv in layers)
        return batch * self.page_size * held

    def largest_batch(self, memory: int | float, length: int, draft: "Deployment | None" = None) -> int:
        """Most rows of `length` positions whose cache fits beside the weights in so many bytes, a draft model's
        included; 0 if none does."""
        models = [self] if draft is None else [self, draft]
        left = memory - sum(model.parameter_bytes for model in models)
        return max(0, int(left // sum(model.cache_bytes(1, length) for model in models)))

    def longest_context(self, memory: int | float, batch: int, draft: "Deployment | None" = None) -> int:
        """Most positions a row, in whole pages, at which `batch` rows fit; at most the model's `max_position`."""
        models = [self] if draft is None else [self, draft]
        left = memory - sum(model.parameter_bytes for model in models)
        sizes = range(self.page_size, self.config.max_position + self.page_size, self.page_size)
        pages = bisect.bisect_right(sizes, left, key=lambda n: sum(model.cache_bytes(batch, n) for model in models))
        return min(pages * self.page_size, self.config.max_position)
