"""Ridgeline: pure-functional JAX inference for decoder-only language models.

Prefill and decode are two programs, compiled apart: the first is bound by arithmetic, the second by memory.

    import ridgeline as rl

    model = rl.load_model("bundled")
    print(rl.generate(model, ["Once upon a time"], rl.SamplingParams(max_tokens=64))[0].text)
"""

from . import roofline
from .decode.cache import KVCache, init_cache
from .decode.generate import StreamChunk, default_sampling, generate, stream, warm_up
from .decode.loop import decode_steps
from .decode.lowering import lower_decode, lower_prefill
from .decode.prefill import prefill
from .decode.request import RequestOutput, TokenLogprobs
from .decode.sampling.draw import sample
from .decode.sampling.layout import SamplingPlan
from .decode.sampling.params import SamplingParams
from .decode.sampling.state import SamplingState, make_sampling_state
from .decode.score import Comparison, Evaluation, evaluate
from .decode.step import decode_step
from .model.checkpoint import CheckpointError
from .model.config import LayerConfig, ModelConfig, RopeConfig
from .model.hf import config_from_hf
from .model.loading import GenerationDefaults, Model, convert_model, load_model
from .model.params import ParamSpec, count_parameters, init_params, param_shardings, param_specs
from .model.presets import PRESETS, preset
from .model.quantization import QuantizedArray, dequantize, quantize
from .model.schemes import SCHEMES, Quantization, Scheme
from .model.tokenizer import StreamDecoder, Tokenizer
from .model.transformer import AttentionSpec, attend_to_tokens, forward, transformer, unembed
from .sharding import hlo
from .sharding.distributed import initialize_distributed
from .sharding.mesh import make_mesh
from .sharding.plugin import allow_compiling_without_driver
from .sharding.targets import compile_for_target, target_mesh

allow_compiling_without_driver()

__all__ = [
    "PRESETS",
    "SCHEMES",
    "AttentionSpec",
    "CheckpointError",
    "Comparison",
    "Evaluation",
    "GenerationDefaults",
    "KVCache",
    "LayerConfig",
    "Model",
    "ModelConfig",
    "ParamSpec",
    "Quantization",
    "QuantizedArray",
    "RequestOutput",
    "RopeConfig",
    "SamplingParams",
    "SamplingPlan",
    "SamplingState",
    "Scheme",
    "StreamChunk",
    "StreamDecoder",
    "TokenLogprobs",
    "Tokenizer",
    "attend_to_tokens",
    "compile_for_target",
    "config_from_hf",
    "convert_model",
    "count_parameters",
    "decode_step",
    "decode_steps",
    "default_sampling",
    "dequantize",
    "evaluate",
    "forward",
    "generate",
    "hlo",
    "init_cache",
    "init_params",
    "initialize_distributed",
    "load_model",
    "lower_decode",
    "lower_prefill",
    "make_mesh",
    "make_sampling_state",
    "param_shardings",
    "param_specs",
    "prefill",
    "preset",
    "quantize",
    "roofline",
    "sample",
    "stream",
    "target_mesh",
    "transformer",
    "unembed",
    "warm_up",
]
