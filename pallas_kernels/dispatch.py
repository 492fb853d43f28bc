"""Which implementation serves an op: the kernel where the device and the case allow it, else the reference."""

import functools
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.lib import cuda_versions
from jax.sharding import AbstractMesh
from jaxtyping import Array

from .pages import AttentionOptions, Pages

Implementation = Literal["reference", "mosaic"] | None

_HEAD_DIMS = (64, 80, 96, 128, 192, 256)
_PAGE_SIZES = (16, 32, 64, 128)
_MAX_GROUP = 16
_MISCOMPILING = range(12_080, 12_091)  # versions of CUDA, which JAX's own attention refuses too
_HOPPER = re.compile(r"\bG?H(20|100|200|800)\b")
_logger = logging.getLogger("ridgeline")


class Device(NamedTuple):
    """What a program is traced for: of the mesh it lies on, or else JAX's default device.

    Attributes:
      platform: "gpu" or "cpu".
      kind: the device's name, such as "NVIDIA H200".
      multiprocessors: how many it has, or None where JAX does not say.
    """

    platform: str
    kind: str
    multiprocessors: int | None

    @property
    def is_hopper(self) -> bool:
        return self.platform == "gpu" and _HOPPER.search(self.kind) is not None


def current_device(mesh: AbstractMesh | None = None) -> Device:
    """The device that the program being traced will run on: of that mesh, or of the one that is traced for."""
    abstract = (jax.sharding.get_abstract_mesh() if mesh is None else mesh).abstract_device
    if abstract is not None:
        return Device(abstract.platform, abstract.device_kind, abstract.num_cores)
    default = jax.config.jax_default_device  # a device, or a platform's name
    device = default if isinstance(default, jax.Device) else jax.devices(default)[0]
    return Device(device.platform, device.device_kind, getattr(device, "core_count", None))


def cuda_version() -> int | None:
    """Of JAX's CUDA plugin, which compiles for GPUs: 1000 * major + 10 * minor; None where there is none."""
    return None if cuda_versions is None else cuda_versions.cuda_runtime_get_version()


def _check_compiler() -> None:
    version = cuda_version()
    if version in _MISCOMPILING:
        name = f"{version // 1000}.{version % 1000 // 10}"
        raise NotImplementedError(f"CUDA is {name}, whose ptxas miscompiles causal masks; install jax[cuda13]")


def check_case(q: jax.Array, pages: Pages, options: AttentionOptions, *, max_tokens: int | None = None) -> None:
    """NotImplementedError, with the reason, unless the attention kernels serve such queries and pages."""
    *tokens, _, group, head_dim = q.shape[1:]
    page_size = pages.k.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"queries are {q.dtype}; the kernel takes bfloat16 and float16")
    if pages.k_scales is None and not (pages.k.dtype == pages.v.dtype == q.dtype):
        raise NotImplementedError(f"pages are {pages.k.dtype} and queries {q.dtype}; the kernel takes one for both")
    if head_dim not in _HEAD_DIMS:
        raise NotImplementedError(f"head_dim is {head_dim}; the kernel takes {_listed(_HEAD_DIMS)}")
    if page_size not in _PAGE_SIZES:
        raise NotImplementedError(f"page_size is {page_size}; the kernel takes {_listed(_PAGE_SIZES)}")
    if group > _MAX_GROUP:
        raise NotImplementedError(f"{group} queries share a KV head; the kernel takes up to {_MAX_GROUP}")
    if not options.scale > 0:
        raise NotImplementedError(f"scale is {options.scale}; the kernel takes positive scales")
    if max_tokens is not None and tokens and tokens[0] > max_tokens:
        raise NotImplementedError(f"{tokens[0]} new tokens a row; the kernel takes up to {max_tokens}")


def serve(
    op: str,
    implementation: Implementation,
    mosaic: Callable[..., Array],
    reference: Callable[..., Array],
    check: Callable[[], None],
    *arrays: Any,
) -> Array:
    """Runs one of two functions of `arrays`, which may be pytrees.

    Args:
      op: a name for messages.
      implementation: as the op's caller gave it.
      mosaic, reference: the two.
      check: raises NotImplementedError, with the reason, if the kernel does not serve the case.

    Raises:
      NotImplementedError: "mosaic" was asked for and does not serve the case, or this CUDA miscompiles it.
      ValueError: no such implementation.
    """
    if implementation == "reference":
        return reference(*arrays)
    if implementation == "mosaic":
        _check_compiler()
        check()
        return mosaic(*arrays)
    if implementation is not None:
        raise ValueError(
            f"{op}: implementation {implementation!r} is not available; choose None, 'reference' or 'mosaic'"
        )
    device = current_device()
    if not device.is_hopper:
        _say_once(f"{op}: the kernels need a Hopper GPU and this is {device.kind!r}; XLA serves", device.platform)
        return reference(*arrays)
    try:
        _check_compiler()
        check()
    except NotImplementedError as refusal:
        _say_once(f"{op}: {refusal}; XLA serves", device.platform)
        return reference(*arrays)
    return lax.platform_dependent(*arrays, cuda=mosaic, default=reference)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


@functools.cache
def _say_once(message: str, platform: str) -> None:
    """A warning on GPUs, where it costs speed; a line of the log elsewhere, where nobody expected a kernel."""
    if platform == "gpu":
        warnings.warn(message, stacklevel=4)
    else:
        _logger.info(message)
