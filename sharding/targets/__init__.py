"""GPUs that are not there: programs compile for them on any machine, and nothing runs.

    mesh = target_mesh("h200", tensor=8)
    compiled = compile_for_target(lower_decode(config, mesh, batch_size=16, max_length=8192))
    compiled.memory_analysis()  # bytes a device
    compiled.as_text()          # optimized HLO: every kernel and every collective

It needs the CUDA plugin of JAX, which holds the compiler, and none of NVIDIA's own packages.
"""

import math
from importlib import metadata

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from ..mesh import AXES, make_mesh
from .chips import CHIPS, Chip


def target_mesh(target: str, *, data: int = 1, expert: int = 1, tensor: int = 1) -> Mesh:
    """A mesh of GPUs of one host, to place `jax.ShapeDtypeStruct`s on.

    What is lowered with arguments that lie on it compiles as on a machine that has these GPUs, autotuning apart.

    Args:
      target: a key of `CHIPS`, such as "h200".
      data, expert, tensor: as in `make_mesh`.

    Raises:
      ValueError: no such target, or a size that is not positive.
      RuntimeError: the CUDA plugin is not installed.
    """
    sizes = dict(zip(AXES, (data, expert, tensor), strict=True))
    text = find_chip(target).target_config()
    if not any(plugin.name.startswith("xla_cuda") for plugin in metadata.entry_points(group="jax_plugins")):
        raise RuntimeError(
            f"compiling for {target!r} needs the CUDA plugin of JAX, which is not installed: "
            f"pip install jax-cuda13-plugin=={jax.__version__}"
        )
    count = max(1, math.prod(sizes.values()))
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x1x{count}")
    return make_mesh(**sizes, devices=topology.devices)


def compile_for_target(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """`lowered.compile()`, kept out of the persistent compilation cache, which cannot read such a program back."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, math.inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update(setting, before)


def find_chip(target: str) -> Chip:
    """The chip of a target's name; ValueError where there is none."""
    if target not in CHIPS:
        raise ValueError(f"target {target!r} is not known; known: {', '.join(CHIPS)}")
    return CHIPS[target]


__all__ = ["CHIPS", "Chip", "compile_for_target", "find_chip", "target_mesh"]
