"""EAGLE-3 heads as they are published: what their config.json says, and where their tensors lie.

Sources: eagle/model/cnets.py of SafeAILab/EAGLE, specforge/modeling/draft/llama3_eagle.py of sgl-project/SpecForge.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..config import ModelConfig
from ..fields import CheckpointError, Fields, an_object, flag, list_of, whole
from ..params import ParamSpec, float_specs
from . import llama
from .declared import CONFIG
from .family import Piece, TensorMap
from .tensors import decoder_tensors
from .tensors import whole as whole_tensor

_EAGLE = {"eagle_aux_hidden_state_layer_ids": list_of(whole(0), 3, 3), "use_aux_hidden_state": flag}
_CONFIG = CONFIG | {
    "draft_vocab_size": whole(),
    "target_hidden_size": whole(),
    "eagle_config": an_object(_EAGLE),
    "norm_before_residual": flag,
}
_LAYER = re.compile(r"^(midlayer|layers\.0)\.")
LAYER = "model.layers.0."


@dataclasses.dataclass(frozen=True)
class EagleConfig:
    """A head: one decoder layer that reads a token and three of the target's hidden states.

    Attributes:
      decoder: its layer and its vocabulary, as those of a model of one layer.
      target_vocab_size: of the tokens that it reads.
      target_dim: the target's embed_dim.
      layers: after how many of the target's layers the states are taken; None for 2, L / 2 and L - 3 of L.
    """

    decoder: ModelConfig
    target_vocab_size: int
    target_dim: int
    layers: tuple[int, ...] | None

    def layers_of(self, count: int) -> tuple[int, ...]:
        """Those of a target with so many layers; ValueError where it does not have three of them."""
        layers = self.layers or (2, count // 2, count - 3)
        if not 0 < layers[0] < layers[1] < layers[2] <= count:
            raise ValueError(f"an EAGLE-3 head reads the states after layers {layers}, and the target has {count}")
        return layers


def eagle_config(hf: Mapping[str, Any], file: str) -> EagleConfig:
    """The head that a config.json describes.

    Raises:
      CheckpointError: a field that is missing or out of range, or what is not supported.
    """
    fields = Fields(hf, _CONFIG, file)
    fields.only("num_hidden_layers", (1,), "a head of one layer is")
    fields.only("norm_before_residual", (False,), "the residual stream is taken before the norm")
    for name in ("attention_bias", "mlp_bias"):
        fields.only(name, (False,), "heads have no biases")
    vocabulary = fields.get("draft_vocab_size", fields["vocab_size"])
    try:
        decoder = llama.config(fields | {"vocab_size": vocabulary, "tie_word_embeddings": False})
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error
    own = fields.object("eagle_config")
    own.only("use_aux_hidden_state", (True,), "heads of EAGLE-3 read three states")
    ids = own.get("eagle_aux_hidden_state_layer_ids")
    # The file counts layers from 0 and means what each gives.
    layers = None if ids is None else tuple(index + 1 for index in ids)
    return EagleConfig(decoder, fields["vocab_size"], fields.get("target_hidden_size", decoder.embed_dim), layers)


def eagle_specs(config: EagleConfig, tensor: int = 1) -> dict[str, ParamSpec]:
    """The parameters of a head, but for its own embedding and the table of its tokens, which it may lack."""
    decoder, D = config.decoder, config.decoder.embed_dim
    layer = dict(float_specs(decoder, tensor)["layers"][0])
    qkv = layer["qkv"]
    norm = layer["mlp_norm"]
    return {
        **layer,
        "qkv": dataclasses.replace(qkv, shape=(*qkv.shape[:-1], 2 * D)),
        "hidden_norm": norm,
        "final_norm": norm,
        "fc": ParamSpec((D, 3 * config.target_dim), decoder.dtype, (None, None), in_axes=1),
        "unembedding": ParamSpec((decoder.vocab_size, D), decoder.dtype, (None, "embed"), in_axes=1),
    }


def eagle_tensors(config: EagleConfig) -> TensorMap:
    """Where they lie, by `eagle_name`s."""
    decoder, D = config.decoder, config.decoder.embed_dim
    layer = decoder_tensors(decoder)
    found = {name.removeprefix("layers.0."): pieces for name, pieces in layer.items() if name.startswith("layers.0.")}
    # Queries, keys and values read the token's embedding and the state, each after a norm, side by side.
    found["qkv"] = tuple(dataclasses.replace(piece, shape=(piece.shape[0], 2 * D)) for piece in found["qkv"])
    return found | {
        "hidden_norm": whole_tensor(f"{LAYER}hidden_norm.weight", D),
        "final_norm": whole_tensor("model.norm.weight", D),
        "fc": whole_tensor("model.fc.weight", D, 3 * config.target_dim),
        "unembedding": whole_tensor("lm_head.weight", decoder.vocab_size, D),
    }


def eagle_names(tensors: Iterable[str]) -> dict[str, str]:
    """The names in the file by those of `eagle_tensors`: SafeAILab's and SpecForge's "midlayer", vLLM's "layers.0"."""
    names = {}
    for name in tensors:
        bare = name.removeprefix("model.")
        ours = _LAYER.sub(LAYER, bare)
        names[ours if ours != bare or bare.startswith("lm_head") else f"model.{bare}"] = name
    return names


EMBEDDING, TOKENS = "model.embed_tokens.weight", "model.d2t"
IGNORED = ("model.t2d",)
"""Which tokens a head has, which `TOKENS` tells too."""


def embedding_pieces(config: EagleConfig) -> tuple[Piece, ...]:
    return whole_tensor(EMBEDDING, config.target_vocab_size, config.decoder.embed_dim)
