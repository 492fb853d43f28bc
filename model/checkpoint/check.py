"""What a checkpoint holds against what its configuration calls for."""

import dataclasses
import math
import re
import warnings
from collections.abc import Container, Mapping
from pathlib import Path

from ..config import ModelConfig
from ..hf import family_of
from ..hf.family import Piece, TensorMap
from .files import CheckpointError, listing
from .layout import HEAD, decoder_prefix
from .safetensors import DTYPES, FLOATS, Checkpoint, TensorInfo, check_dtype

# Buffers of rotary embeddings, which older checkpoints carry and the configuration determines.
_HARMLESS = re.compile(r"(^|\.)((rotary|rope)\w*\.\w+|\w*(inv_freq|freqs_cis|cos_cached|sin_cached))$")
# Of activations and of the KV cache, beside quantized weights: those that are not used.
_SCALES = re.compile(r"\.(input|output|activation|act|[qkv]|attn|prob)_(scale|zero_point)(_inv)?$")
_ADAPTER = re.compile(r"\.(lora_\w+|base_layer)\.")
_UNEMBEDDING = re.compile(r"(^|\.)lm_head\.weight$")


def check_tensors(checkpoint: Checkpoint, config: ModelConfig, tensors: TensorMap, multimodal: bool = False) -> None:
    """Compare what a checkpoint holds with what its configuration calls for, and say once what is left out.

    Args:
      checkpoint: the open checkpoint.
      config: the model.
      tensors: where its parameters lie, by the names that they have in this checkpoint (`as_stored`).
      multimodal: whether the model is the text part of a larger one, whose other tensors are left out.

    Raises:
      CheckpointError: a tensor of a dtype that is not read, missing, of another shape, used by no parameter, of another
        layout than the one that is read, or an unembedding that differs from the embedding it is tied to.
    """
    expected = {piece.tensor: piece for pieces in tensors.values() for piece in pieces}
    implied = {tensor.tensor: tensor for piece in expected.values() for tensor in piece.implied}
    infos = {name: info for name, info in checkpoint.tensors.items() if not _HARMLESS.search(name)}
    extra = [name for name in infos if name not in expected and name not in implied]
    others = [name for name in extra if multimodal and not _is_of_decoder(name, tensors)]
    scales = [name for name in extra if config.quantization is not None and _SCALES.search(name)]
    unused = family_of(config).unused
    further = [] if unused is None else [name for name in extra if name.startswith(unused(config))]
    extra = [name for name in extra if name not in {*others, *scales, *further}]

    quantized = config.quantization is not None
    for name in (*expected, *implied, *extra):
        if name in infos:
            dtype = expected[name].dtype if name in expected else None
            wanted = DTYPES if name in implied else [h for h, d in DTYPES.items() if d.name == dtype] or FLOATS
            check_dtype(name, infos[name], wanted, quantized)
    _check_presence(checkpoint, config, expected, infos, extra)
    for name, tensor in implied.items():
        beside = tensor.beside and checkpoint.read(tensor.beside)
        if name in infos and not tensor.holds(checkpoint.read(name), beside):
            raise CheckpointError(f"{infos[name].file}: by tensor {name!r}, {tensor.otherwise}")
    # AutoGPTQ used to write a bias beside every matrix.
    extra = [name for name in extra if not (_beside_packed(name, expected) and not checkpoint.read(name).any())]
    if config.tie_embeddings:
        extra = [name for name in extra if not _is_tied(checkpoint, name, tensors["embedding"][0].tensor)]
    if extra:
        remedy = "check num_hidden_layers, the bias settings and architectures in config.json"
        raise CheckpointError(
            f"{listing(sorted({str(infos[name].file) for name in extra}))}: {len(extra)} tensors that nothing in "
            f"config.json calls for ({_model(config)}): {listing(extra)}; {_merge(extra) or remedy}"
        )
    if others:
        parts = sorted({".".join(name.split(".")[: 1 + name.startswith("model.")]) for name in others})
        _say(checkpoint, f"the text part alone is loaded, without the {len(others)} tensors of {listing(parts)}")
    if further:
        _say(checkpoint, f"the {len(further)} tensors of {unused(config)[:-1]}, which drafts tokens, are not used")
    if scales:
        kinds = sorted({name.rpartition(".")[2] for name in scales})
        _say(
            checkpoint,
            f"{len(scales)} scales of activations or of the KV cache are not used ({listing(kinds)}): these stay in "
            f"{config.dtype}, and kv_dtype= stores the cache in fewer bits",
        )


def _check_presence(
    checkpoint: Checkpoint,
    config: ModelConfig,
    expected: Mapping[str, Piece],
    infos: Mapping[str, TensorInfo],
    extra: list[str],
) -> None:
    """Raise `CheckpointError` unless every tensor that is expected is there and has its shape."""
    needed = dict.fromkeys(name for piece in expected.values() for name in (piece.tensor, *piece.beside))
    missing = [name for name in needed if name not in infos]
    if missing:
        checkpoint.require(missing)
        instead = f"; it holds {listing(extra)} instead" if extra else ""
        remedy = "the checkpoint is incomplete or config.json belongs to another"
        if all(_UNEMBEDDING.search(name) for name in missing):
            remedy += "; if embeddings are tied, set tie_word_embeddings to true"
        raise CheckpointError(
            f"{_where(checkpoint)} lacks {len(missing)} of the {len(needed)} tensors that config.json calls for "
            f"({_model(config)}): {listing(missing)}{instead}; {_merge(extra) or remedy}"
        )
    for name, piece in expected.items():
        shape = infos[name].shape
        if shape != piece.shape and not math.prod(shape) == math.prod(piece.shape) == 1:  # a scale may have no axis
            raise CheckpointError(
                f"{infos[name].file}: tensor {name!r} has shape {list(shape)}, expected {list(piece.shape)} by "
                f"config.json ({_sizes(config)}); config.json belongs to another checkpoint"
            )


def _is_of_decoder(name: str, tensors: TensorMap) -> bool:
    return name.startswith(decoder_prefix(tensors)) or f".{HEAD}" in f".{name}"


def _is_tied(checkpoint: Checkpoint, name: str, embedding: str) -> bool:
    """Whether a tensor is the output projection, stored though it is tied to the embedding."""
    if not _UNEMBEDDING.search(name):
        return False
    if not checkpoint.same_bytes(name, embedding):
        raise CheckpointError(
            f"{checkpoint.tensors[name].file}: config.json ties the embeddings, but tensor {name!r} differs from "
            f"{embedding!r}; set tie_word_embeddings to false in config.json to use it"
        )
    return True


def _merge(extra: list[str]) -> str | None:
    """The remedy where some of the tensors are an adapter's."""
    if not any(_ADAPTER.search(name) for name in extra):
        return None
    return "it holds adapters (LoRA) beside the weights; merge them with peft, merge_and_unload(), and load the result"


def _say(checkpoint: Checkpoint, message: str) -> None:
    warnings.warn(f"{_where(checkpoint)}: {message}", stacklevel=4)


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


def _model(config: ModelConfig) -> str:
    return f"{config.num_layers} layers of family {config.family!r}"


def _where(checkpoint: Checkpoint) -> Path:
    return checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.directory


def _sizes(config: ModelConfig) -> str:
    return (
        f"vocab_size {config.vocab_size}, hidden_size {config.embed_dim}, intermediate_size {config.ffn_dim}, "
        f"num_attention_heads {config.num_heads}, num_key_value_heads "
        f"{config.num_kv_heads}, head_dim {config.head_dim}"
    )
