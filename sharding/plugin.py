"""JAX's CUDA plugin on machines without a GPU, where it is installed for its compiler alone."""

import logging
from pathlib import Path

_DRIVERS = ("/dev/nvidiactl", "/dev/dxg")  # the second under WSL


def silence_without_driver() -> None:
    """Where there is no NVIDIA driver, keep JAX from logging a traceback that the plugin found none.

    With a driver the plugin's complaint tells what to mend, and is left alone.
    """
    if not any(Path(driver).exists() for driver in _DRIVERS):
        logging.getLogger("jax._src.xla_bridge").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return "plugin configuration error" not in record.getMessage()
