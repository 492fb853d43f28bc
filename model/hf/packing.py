"""How quantized checkpoints pack integers into 32-bit words, undone: rows are outputs, columns run along the inputs.

Every function takes a stored tensor and the slices of the unpacked matrix that are wanted, and reads no others. Values
come out two to a byte, the even input in the low four bits, as `QuantizedArray` holds them. Words are little-endian.
Sources: `pack_to_int32` of compressed-tensors, `WQLinear_GEMM.from_linear` of AutoAWQ, `QuantLinear.pack` of AutoGPTQ.
"""

import numpy as np

_ONES = np.uint32(0x11111111)
"""One in each of a word's eight nibbles."""
_LOW = np.uint32(0x0F0F0F0F)
"""The low nibble of each of its bytes."""


def row_words(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Bytes of int32 [O, I / 8], the first input lowest (compressed-tensors' weights): as they lie, nothing moves."""
    return words[rows].view(np.uint8)[:, cols]


def column_words(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Bytes of int32 [I / 8, O], the first input lowest (GPTQ's weights)."""
    first = cols.start // 4
    pairs = np.ascontiguousarray(words[first : -(-cols.stop // 4), rows].T).view(np.uint8)
    return pairs[:, cols.start - 4 * first : cols.stop - 4 * first]


def awq_words(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Bytes of int32 [I, O / 8], a word's nibbles being of the outputs 0, 2, 4, 6, 1, 3, 5, 7 (AutoAWQ's weights)."""
    first = rows.start // 8
    part = np.ascontiguousarray(words[2 * cols.start : 2 * cols.stop, first : -(-rows.stop // 8)].T).view(np.uint32)
    even, odd = part[:, ::2], part[:, 1::2]
    # Two inputs side by side in a byte: first those of a word's nibbles 0, 2, 4, 6, then those of 1, 3, 5, 7. The bytes
    # 0 to 3 of the first are of outputs 0, 4, 1, 5, of the second of 2, 6, 3, 7.
    outputs = np.empty((len(part), 2, 2, 2, even.shape[1]), np.uint8)
    for half, pairs in enumerate((even & _LOW | (odd & _LOW) << 4, even >> 4 & _LOW | odd & ~_LOW)):
        outputs[:, :, half] = pairs.view(np.uint8).reshape(*pairs.shape, 2, 2).transpose(0, 3, 2, 1)
    return outputs.reshape(8 * len(part), -1)[rows.start - 8 * first : rows.stop - 8 * first]


def row_zeros(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Zero points of int32 [O / 8, N], the first output lowest (compressed-tensors)."""
    return _nibbles(words.T).T[rows, cols]


def gptq_zeros(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Zero points of int32 [N, O / 8], the first output lowest (GPTQ's second format)."""
    return _nibbles(words).T[rows, cols]


def gptq_v1_zeros(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """The same, where one was subtracted from each.

    GPTQModel subtracts it from whole words, so that a zero borrows from the next nibble, and undoes it with the carry.
    """
    return gptq_zeros(words.view(np.uint32) + _ONES, rows, cols)


def awq_zeros(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Zero points of int32 [N, O / 8] in the order of `awq_words`."""
    nibbles = _nibbles(words)
    ordered = nibbles.reshape(len(words), -1, 2, 4).swapaxes(2, 3).reshape(nibbles.shape)
    return ordered.T[rows, cols]


def transposed(scales: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """Scales [N, O] (AutoAWQ and GPTQ)."""
    return scales.T[rows, cols]


def spread(scale: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """One scale [1] of all outputs."""
    return np.broadcast_to(scale, (rows.stop - rows.start, 1))[:, cols]


def block_rows(scales: np.ndarray, rows: slice, cols: slice, *, block: int, step: int) -> np.ndarray:
    """Scales [O / block, N] of blocks of outputs, as those of smaller blocks of `step`, which divides `block`."""
    return scales[np.arange(rows.start, rows.stop) * step // block, cols]


def _nibbles(words: np.ndarray) -> np.ndarray:
    """[A, B] words as uint8 [A, 8 B], the lowest four bits first."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(words), -1)
