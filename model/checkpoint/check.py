"""What a checkpoint holds against what its configuration calls for."""

import dataclasses
import re
from collections.abc import Container
from pathlib import Path

import numpy as np

from ..config import ModelConfig
from ..hf.family import TensorMap
from .files import CheckpointError, listing
from .safetensors import DTYPES, FLOATS, Checkpoint, check_dtype

# Buffers that older checkpoints carry and that the configuration determines.
_HARMLESS = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_UNEMBEDDING = "lm_head.weight"


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, tensors: TensorMap) -> None:
    """Compare what a checkpoint holds with what its configuration calls for.

    Raises:
      CheckpointError: a tensor of a dtype that is not read, missing, of another shape, used by no parameter, of another
        layout than the one that is read, or an unembedding that differs from the embedding it is tied to.
    """
    expected = {piece.tensor: piece for pieces in tensors.values() for piece in pieces}
    implied = {tensor.tensor: tensor for piece in expected.values() for tensor in piece.implied}
    found = {name: info for name, info in checkpoint.tensors.items() if not _HARMLESS.search(name)}
    for name, info in found.items():
        if name in implied:
            wanted = list(DTYPES)
        elif name in expected and expected[name].dtype is not None:
            wanted = [header for header, dtype in DTYPES.items() if dtype.name == expected[name].dtype]
        else:
            wanted = list(FLOATS)
        check_dtype(name, info, wanted)

    model = f"{config.num_layers} layers of family {config.family!r}"
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected and name not in implied]
    if missing:
        unused = f"; it holds {listing(extra)} instead" if extra else ""
        tied = "; if embeddings are tied, set tie_word_embeddings to true" if missing == [_UNEMBEDDING] else ""
        raise CheckpointError(
            f"{_where(checkpoint)} lacks {len(missing)} of the {len(expected)} tensors that config.json calls for "
            f"({model}): {listing(missing)}{unused}; the checkpoint is incomplete or config.json belongs to "
            f"another{tied}"
        )
    for name, piece in expected.items():
        if found[name].shape != piece.shape:
            raise CheckpointError(
                f"{found[name].file}: tensor {name!r} has shape {list(found[name].shape)}, expected "
                f"{list(piece.shape)} by config.json ({_sizes(config)}); config.json belongs to another checkpoint"
            )
    for name, tensor in implied.items():
        if name in found and not np.array_equal(checkpoint.read(name), tensor.contents()):
            raise CheckpointError(f"{found[name].file}: by tensor {name!r}, {tensor.otherwise}")
    # AutoGPTQ used to write a bias beside every matrix.
    extra = [name for name in extra if not (_beside_packed(name, expected) and not checkpoint.read(name).any())]
    if config.tie_embeddings and _UNEMBEDDING in extra:
        embedding = tensors["embedding"][0].tensor
        if not checkpoint.same_bytes(_UNEMBEDDING, embedding):
            raise CheckpointError(
                f"{found[_UNEMBEDDING].file}: config.json ties the embeddings, but tensor {_UNEMBEDDING!r} differs "
                f"from {embedding!r}; set tie_word_embeddings to false in config.json to use it"
            )
        extra.remove(_UNEMBEDDING)
    if extra:
        files = sorted({str(found[name].file) for name in extra})
        raise CheckpointError(
            f"{listing(files)}: {len(extra)} tensors that nothing in config.json calls for ({model}): "
            f"{listing(extra)}; check num_hidden_layers, the bias settings and architectures in config.json"
        )


def _beside_packed(name: str, expected: Container[str]) -> bool:
    return name.endswith(".bias") and name.removesuffix("bias") + "qweight" in expected


def checkpoint_dtype(checkpoint: Checkpoint, tensors: TensorMap) -> str | None:
    """The dtype of the stored embedding, by its JAX name; None if it is absent or not read."""
    info = checkpoint.tensors.get(tensors["embedding"][0].tensor)
    return FLOATS[info.dtype].name if info is not None and info.dtype in FLOATS else None


def with_stored_scales(checkpoint: Checkpoint, config: ModelConfig, tensors: TensorMap) -> ModelConfig:
    """The configuration with the scales in the dtype of the stored ones, of which config.json says nothing."""
    schemes = {"layers": None, "output": None}
    for name, pieces in tensors.items():
        part = "output" if name == "unembedding.scales" else "layers"
        info = checkpoint.tensors.get(pieces[0].tensor)
        if name.endswith(".scales") and schemes[part] is None and info is not None and info.dtype in FLOATS:
            scheme = getattr(config.quantization, part)
            schemes[part] = dataclasses.replace(scheme, scale_dtype=FLOATS[info.dtype].name)
    found = {part: scheme for part, scheme in schemes.items() if scheme is not None}
    return config.replace(quantization=dataclasses.replace(config.quantization, **found)) if found else config


def _where(checkpoint: Checkpoint) -> Path:
    return checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.directory


def _sizes(config: ModelConfig) -> str:
    return (
        f"vocab_size {config.vocab_size}, hidden_size {config.embed_dim}, intermediate_size {config.ffn_dim}, "
        f"num_attention_heads {config.num_heads}, num_key_value_heads "
        f"{config.num_kv_heads}, head_dim {config.head_dim}"
    )
