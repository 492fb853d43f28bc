"""Hugging Face checkpoints: one small file a family, and the look-up over them."""

from .family import Family, HFConfig, Piece, TensorMap

__all__ = ["Family", "HFConfig", "Piece", "TensorMap"]
