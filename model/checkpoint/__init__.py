"""Reading checkpoints, and converting them."""

from .files import CheckpointError
from .load import load_params, read_parameter
from .safetensors import Checkpoint

__all__ = ["Checkpoint", "CheckpointError", "load_params", "read_parameter"]
