"""Under which prefixes a checkpoint keeps the tensors that a family names."""

import re

from ..hf.family import TensorMap
from .safetensors import Checkpoint

DECODER, HEAD = "model.", "lm_head."
"""How families prefix the names of tensors of the decoder and of the output projection."""

_PARTS = re.compile(r"(.*?)(embed_tokens\.|layers\.\d+\.)")
_LAST = re.compile(r"(?<![^.])model\.$")
_HEADS = re.compile(r"((?:.*\.)?)lm_head\.")
_SYNONYMS = {"weight_scale": ["weight_scale_inv"], "input_scale": ["activation_scale", "act_scale"]}
"""Other names of scales: transformers' and Mistral's, and those of the oldest checkpoints of AutoFP8."""


def as_stored(checkpoint: Checkpoint, tensors: TensorMap) -> TensorMap:
    """The tensor map with the names that the tensors have in this checkpoint.

    Bare decoders have no prefix, multimodal checkpoints "language_model.model." or "model.language_model.", merged
    adapters "base_model.model.model.". The decoder is where the most of its tensors are; where none is, the names stay.
    """
    names = checkpoint.tensors.keys()
    wanted = [piece.tensor.removeprefix(DECODER) for pieces in tensors.values() for piece in pieces]
    decoders = {match[1] for name in names if (match := _PARTS.match(name))} | {DECODER}
    held = {prefix: sum(prefix + name in names for name in wanted) for prefix in sorted(decoders)}
    decoder = max(held, key=lambda prefix: (held[prefix], prefix == DECODER))
    beside = _LAST.sub("", decoder)
    heads = {match[1] for name in names if (match := _HEADS.match(name))} | {beside}
    head = min(heads, key=lambda prefix: (f"{prefix}{HEAD}weight" not in names, prefix != beside, len(prefix), prefix))

    def stored(name: str) -> str:
        name = head + name if name.startswith(HEAD) else decoder + name.removeprefix(DECODER)
        module, _, part = name.rpartition(".")
        synonyms = [f"{module}.{other}" for other in _SYNONYMS.get(part, [])]
        return next((one for one in [name, *synonyms] if one in names), name)

    return {name: tuple(piece.renamed(stored) for piece in pieces) for name, pieces in tensors.items()}


def has_head(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint stores an output projection, in whatever form."""
    return any(_HEADS.match(name) for name in checkpoint.tensors)


def decoder_prefix(tensors: TensorMap) -> str:
    """Under which prefix the tensors of the decoder are."""
    return tensors["embedding"][0].tensor.removesuffix("embed_tokens.weight")
