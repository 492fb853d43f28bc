"""Programs without arrays: prefill and decode lowered, compiled for GPUs that need not be there, and read.

from ridgeline import programs

lowered = programs.lower_decode(config, programs.target_mesh("h200", tensor=8), batch_size=16, max_length=8192)
compiled = programs.compile_for_target(lowered)
print(programs.hlo.collectives(programs.hlo.parse(compiled.as_text())))
"""

from .decode.lowering import abstract_cache, abstract_params, bytes_per_device, lower_decode, lower_prefill
from .sharding import hlo
from .sharding.targets import compile_for_target, target_mesh

__all__ = [
    "abstract_cache",
    "abstract_params",
    "bytes_per_device",
    "compile_for_target",
    "hlo",
    "lower_decode",
    "lower_prefill",
    "target_mesh",
]
