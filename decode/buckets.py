"""The one table of padded sizes: every shape a program is compiled for comes from here, in use and in warm-up."""

from ..model import kv_specs

PREFILL_CHUNK = kv_specs.PREFILL_CHUNK
"""Longest prefill, in tokens; longer prompts are prefilled in chunks of it."""

SMALLEST_PREFILL = 16
"""Tokens of the smallest compiled prefill."""

DECODE_STEPS = 8
"""Decode steps a dispatch: tokens reach the host in blocks of this many."""

SPECULATION_ROUNDS = 4
"""Rounds of speculation a dispatch, each of which makes one token a row and those of its draft that are right."""


def decode_steps(drafted: int) -> int:
    """Steps of a dispatch that does nothing else, or rounds that each draft so many tokens."""
    return SPECULATION_ROUNDS if drafted else DECODE_STEPS


def batch_bucket(rows: int) -> int:
    """Rows of a compiled batch that holds `rows` requests: the next power of two."""
    return 1 << (rows - 1).bit_length()


def prefill_bucket(tokens: int) -> int:
    """Tokens of a compiled prefill of `tokens` tokens: the next power of two from SMALLEST_PREFILL to PREFILL_CHUNK."""
    return min(max(SMALLEST_PREFILL, 1 << (tokens - 1).bit_length()), PREFILL_CHUNK)


def prefill_floor(tokens: int) -> int:
    """The largest compiled prefill that `tokens` tokens fill; 0 if they fill none."""
    return 0 if tokens < SMALLEST_PREFILL else min(1 << (tokens.bit_length() - 1), PREFILL_CHUNK)


def token_list_bucket(tokens: int) -> int:
    """Entries of a compiled list of `tokens` token ids: 16, 64, 256 and so on."""
    return next(size for size in (16 * 4**n for n in range(16)) if size >= tokens)


def cache_bucket(length: int) -> int:
    """Positions of a compiled cache that holds `length`: the next power of two from 128, past 4,096 the next 4,096."""
    return max(128, 1 << (length - 1).bit_length()) if length <= 4096 else -(-length // 4096) * 4096
