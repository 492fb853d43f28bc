"""Where families keep routed experts in a checkpoint, and what their config.json files share."""

import dataclasses
import re
from collections.abc import Sequence

from ..config import ModelConfig
from ..fields import Fields
from .family import Piece, TensorMap
from .tensors import whole

_COUNT = ("num_local_experts", "num_experts", "n_routed_experts")


def expert_count(hf: Fields, default: int) -> int:
    """Experts of a layer, under any of the names that versions of transformers write."""
    return next((hf[key] for key in _COUNT if key in hf), default)


def sparse_layers(hf: Fields) -> list[str]:
    """What Qwen's layers have: each `decoder_sparse_step`-th has experts, unless it is of `mlp_only_layers`."""
    step, dense = hf["decoder_sparse_step"], hf.get("mlp_only_layers", ())
    return ["dense" if index in dense or (index + 1) % step else "experts" for index in range(hf["num_hidden_layers"])]


def expert_tensors(
    config: ModelConfig,
    prefix: str,
    *,
    module: str = "mlp",
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    shared: str = "shared_expert",
) -> TensorMap:
    """The pieces of a layer whose experts are tensors of their own.

    Args:
      config: the model.
      prefix: of the layer's tensors.
      module: that holds the layer's router and experts.
      names: of an expert's gate, up and down projection.
      shared: the module of the expert that all tokens go through.
    """
    experts, D, F = config.experts, config.embed_dim, config.experts.ffn_dim
    module = f"{prefix}{module}."
    gate_up, down = [], []
    for expert in range(experts.count):
        gate, up, out = (f"{module}experts.{expert}.{name}.weight" for name in names)
        gate_up += [Piece(gate, (F, D), (expert, 0)), Piece(up, (F, D), (expert, 1))]
        down.append(Piece(out, (D, F), (expert,)))
    found = {
        "router": whole(f"{module}gate.weight", experts.count, D),
        "gate_up": tuple(gate_up),
        "down": tuple(down),
    }
    if experts.selection_bias:
        found["selection_bias"] = whole(f"{module}gate.e_score_correction_bias", experts.count)
    if experts.shared_ffn_dim:
        S = experts.shared_ffn_dim
        gate, up, out = (f"{module}{shared}.{name}.weight" for name in names)
        found["shared_gate_up"] = (Piece(gate, (S, D), (0,)), Piece(up, (S, D), (1,)))
        found["shared_down"] = whole(out, D, S)
    if experts.shared_gate:
        found["shared_gate"] = whole(f"{module}{shared}_gate.weight", 1, D)
    return found


def fused_experts(tensors: TensorMap) -> TensorMap:
    """The same where all experts of a layer are one tensor, as models of transformers 5 hold and may save them."""
    fused = dict(tensors)
    for name, pieces in tensors.items():
        match = re.fullmatch(r"(model\.layers\.\d+\.)\w+\.experts\.0\.\w+\.weight", pieces[0].tensor)
        layer, part = name.rpartition(".")[::2]
        if match is None or part not in ("gate_up", "down"):
            continue
        module, experts = f"{match[1]}mlp.", pieces[-1].index[0] + 1
        rows, inputs = pieces[0].shape
        fused[name] = whole(f"{module}experts.{part}_proj", experts, rows * len(pieces) // experts, inputs)
        router = fused[f"{layer}.router"][0]
        fused[f"{layer}.router"] = (dataclasses.replace(router, tensor=f"{module}gate.weight"),)
    return fused
