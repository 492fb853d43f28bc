"""Device meshes with the project's three axes."""

import math
import numbers
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

AXES = ("data", "expert", "tensor")
"""Mesh axes, sizes 1 where unused: rows of a batch, experts, and the parts of every layer."""


def make_mesh(*, data: int = 1, expert: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first data * expert * tensor devices.

    Neighbors on the tensor axis are neighbors in the device list, since that axis communicates most.

    Args:
      data: copies of the model, each of which takes its share of the rows of a batch.
      expert: groups that share out the experts of a layer.
      tensor: devices that share every layer.
      devices: `jax.devices()` by default.

    Raises:
      ValueError: a size that is not positive, or more devices asked for than there are.
    """
    sizes = {"data": data, "expert": expert, "tensor": tensor}
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or isinstance(size, bool):
            raise TypeError(f"make_mesh: {name} is {size!r}; it must be a whole number")
        if size < 1:
            raise ValueError(f"make_mesh: {name} is {size}; it must be at least 1")
    devices = jax.devices() if devices is None else devices
    if not isinstance(devices, Sequence) or not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError(f"make_mesh: devices is {devices!r:.80}; it must be a list of JAX's devices, or None")
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(
            f"make_mesh: data {data} x expert {expert} x tensor {tensor} needs {needed} devices and there are "
            f"{len(devices)}; lower one of them (on a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={needed} "
            "makes as many)"
        )
    return Mesh(np.array(devices[:needed]).reshape(*sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
