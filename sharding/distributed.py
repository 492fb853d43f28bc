"""Start-up of several processes, one or more a host, as one program."""

from typing import Any

import jax


def initialize_distributed(**options: Any) -> None:
    """`jax.distributed.initialize`: call it first, before anything touches a device, in every process.

    Afterwards `jax.devices()` lists the devices of all processes, so that `make_mesh` spans them. Every process then
    makes the same calls in the same order: each loads its own shards, and each gets the results of `generate`.

    Args:
      **options: as `jax.distributed.initialize` takes them: coordinator_address ("host:port" of process 0),
        num_processes, process_id, local_device_ids. On clusters that JAX knows (Slurm, Open MPI, Kubernetes) none is
        needed.
    """
    jax.distributed.initialize(**options)
