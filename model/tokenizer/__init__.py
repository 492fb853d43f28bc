"""Text <-> token ids, chat templates, and text from a stream of ids."""

from .files import load_tokenizer
from .stream import StreamDecoder
from .tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "load_tokenizer"]
