"""JAX's CUDA plugin on machines without a GPU, where it is installed for its compiler alone."""

import os
from pathlib import Path

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # the second under WSL


def allow_compiling_without_driver() -> None:
    """Where there is no NVIDIA driver, spare the plugin its search for CUDA's libraries.

    It would find none, log a traceback, and leave its compiler unregistered. It has to be told before JAX first looks
    for devices.
    """
    if not any(Path(driver).exists() for driver in _DRIVERS):
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
