"""Ridgeline: pure-functional JAX inference for decoder-only language models.

Prefill and decode are two programs, compiled apart: the first is bound by arithmetic, the second by memory.

    import ridgeline as rl

    model = rl.load_model("bundled")
    print(rl.generate(model, ["Once upon a time"], rl.SamplingParams(max_tokens=64))[0].text)
"""

from . import interrupts, programs, roofline  # noqa: F401 - interrupts goes before anything else
from .decode.beam import BeamSearchOutput, BeamSearchSequence, beam_search
from .decode.cache import KVCache, init_cache
from .decode.constraints import Constraint
from .decode.engine.async_engine import AsyncEngine
from .decode.engine.engine import Engine, EngineFull
from .decode.engine.stats import EngineStats
from .decode.evaluate import evaluate
from .decode.extend import extend
from .decode.fork import fork
from .decode.generate import generate, stream
from .decode.loop import decode_steps
from .decode.prefill import prefill
from .decode.request import RequestOutput, StreamChunk
from .decode.sampling.draw import sample
from .decode.sampling.params import SamplingParams
from .decode.sampling.scores import TokenContext
from .decode.sampling.state import make_sampling_state
from .decode.score import Score, score
from .decode.speculation.draft_model import ModelDrafter
from .decode.speculation.eagle import EagleDrafter
from .decode.speculation.ngram import NGramDrafter
from .decode.step import decode_step
from .model.checkpoint import CheckpointError
from .model.config import ExpertsConfig, LayerConfig, ModelConfig, RopeConfig
from .model.hf.view import from_hf_view, hf_view
from .model.loading import Model, load_model
from .model.params import count_parameters, init_params, param_specs
from .model.presets import PRESETS, preset
from .model.quantization import dequantize, quantize
from .model.saving import save_model
from .model.schemes import SCHEMES
from .model.tokenizer import Tokenizer
from .model.transformer import AttentionSpec, attend_to_tokens, final_norm, forward, transformer, unembed
from .pallas_kernels.attention import attention_weights
from .sharding.distributed import initialize_distributed
from .sharding.mesh import make_mesh
from .sharding.plugin import allow_compiling_without_driver

allow_compiling_without_driver()

__all__ = [
    "PRESETS",
    "SCHEMES",
    "AsyncEngine",
    "AttentionSpec",
    "BeamSearchOutput",
    "BeamSearchSequence",
    "CheckpointError",
    "Constraint",
    "EagleDrafter",
    "Engine",
    "EngineFull",
    "EngineStats",
    "ExpertsConfig",
    "KVCache",
    "LayerConfig",
    "Model",
    "ModelConfig",
    "ModelDrafter",
    "NGramDrafter",
    "RequestOutput",
    "RopeConfig",
    "SamplingParams",
    "Score",
    "StreamChunk",
    "TokenContext",
    "Tokenizer",
    "attend_to_tokens",
    "attention_weights",
    "beam_search",
    "count_parameters",
    "decode_step",
    "decode_steps",
    "dequantize",
    "evaluate",
    "extend",
    "final_norm",
    "fork",
    "forward",
    "from_hf_view",
    "generate",
    "hf_view",
    "init_cache",
    "init_params",
    "initialize_distributed",
    "load_model",
    "make_mesh",
    "make_sampling_state",
    "param_specs",
    "prefill",
    "preset",
    "programs",
    "quantize",
    "roofline",
    "sample",
    "save_model",
    "score",
    "stream",
    "transformer",
    "unembed",
]
