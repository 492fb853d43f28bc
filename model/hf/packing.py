"""How quantized checkpoints pack integers into 32-bit words: rows are outputs, columns run along the inputs.

Every function that reads takes a stored tensor and the slices of the unpacked matrix that are wanted, and reads no
others. Values come out two to a byte, the even input in the low four bits, as `QuantizedArray` holds them. Words are
little-endian.
Sources: `pack_to_int32` of compressed-tensors, `WQLinear_GEMM.from_linear` of AutoAWQ, `QuantLinear.pack` of AutoGPTQ.
"""

import numpy as np

_ONES = {8: np.uint32(0x11111111), 4: np.uint32(0x01010101)}
"""One in each of a word's eight nibbles, and of its four bytes."""
_LOW = np.uint32(0x0F0F0F0F)
"""The low nibble of each of its bytes."""


def row_words(words: np.ndarray, rows: slice, cols: slice, groups: np.ndarray | None = None) -> np.ndarray:
    """Bytes of int32 [O, I / 8], the first input lowest (compressed-tensors' weights): as they lie, nothing moves.

    With `groups`, that of each input, the inputs come sorted by them; so in the three functions after this.
    """
    stored = words[rows].view(np.uint8)
    return stored[:, cols] if groups is None else _pairs(stored, order(groups)[2 * cols.start : 2 * cols.stop])


def row_bytes(words: np.ndarray, rows: slice, cols: slice, groups: np.ndarray | None = None) -> np.ndarray:
    """int8 values of int32 [O, I / 4], stored 128 higher (compressed-tensors' weights of 8 bits)."""
    return _signed(words[rows].view(np.uint8)[:, cols if groups is None else order(groups)[cols]])


def column_words(words: np.ndarray, rows: slice, cols: slice, groups: np.ndarray | None = None) -> np.ndarray:
    """Bytes of int32 [I / 8, O], the first input lowest (GPTQ's weights)."""
    if groups is not None:
        return _pairs(_row_bytes(words[:, rows]), order(groups)[2 * cols.start : 2 * cols.stop])
    first = cols.start // 4
    return _row_bytes(words[first : -(-cols.stop // 4), rows])[:, cols.start - 4 * first : cols.stop - 4 * first]


def column_bytes(words: np.ndarray, rows: slice, cols: slice, groups: np.ndarray | None = None) -> np.ndarray:
    """int8 values of int32 [I / 4, O], stored 128 higher (GPTQ's weights of 8 bits)."""
    if groups is not None:
        return _signed(_row_bytes(words[:, rows])[:, order(groups)[cols]])
    first = cols.start // 4
    stored = _row_bytes(words[first : -(-cols.stop // 4), rows])
    return _signed(stored[:, cols.start - 4 * first : cols.stop - 4 * first])


def dense(words: np.ndarray, rows: slice, cols: slice, *parts: np.ndarray, a_word: int, one_less: bool) -> np.ndarray:
    """float32 weights of int32 [I / 8, O] or, of 8 bits, [I / 4, O], in the order of their inputs.

    Args:
      words, rows, cols: as in `column_bytes`.
      parts: the zero points, the scales, and the group of each input (GPTQ).
      a_word, one_less: as in `gptq_zeros`.
    """
    zeros, scales, groups = parts
    stored, of = _row_bytes(words[:, rows]), groups[cols]
    values = _numbers(stored, np.arange(cols.start, cols.stop)) if a_word == 8 else _signed(stored[:, cols])
    centered = values - gptq_zeros(zeros, rows, slice(None), a_word=a_word, one_less=one_less)[:, of].astype(np.float32)
    return centered * scales.T[rows][:, of].astype(np.float32)


def order(groups: np.ndarray, rows: slice = slice(None), cols: slice | None = None) -> np.ndarray:
    """Which input each is when they are sorted by their groups; as a column where it is read as a parameter."""
    inputs = np.argsort(groups, kind="stable")[rows]
    return inputs if cols is None else inputs[:, None]


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


def row_byte_zeros(words: np.ndarray, rows: slice, cols: slice) -> np.ndarray:
    """The same of int32 [O / 4, N], stored 128 higher."""
    return _signed(np.ascontiguousarray(words.T).view(np.uint8)).T[rows, cols]


def gptq_zeros(words: np.ndarray, rows: slice, cols: slice, *, a_word: int, one_less: bool) -> np.ndarray:
    """Zero points of int32 [N, O / 8] or, 128 higher, [N, O / 4], the first output lowest.

    In GPTQ's first format one was subtracted from each. GPTQModel subtracts it from whole words, so that a zero borrows
    from the next number, and undoes it with the carry.
    """
    words = words.view(np.uint32) + (_ONES[a_word] if one_less else np.uint32(0))
    return (_nibbles(words) if a_word == 8 else _signed(words.view(np.uint8))).T[rows, cols]


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


def largest(scale: np.ndarray, rows: slice, cols: slice, *others: np.ndarray) -> np.ndarray:
    """The largest of some scales of one number each."""
    return np.max([np.float32(one).reshape(1, 1) for one in (scale, *others)], axis=0)


def block_rows(scales: np.ndarray, rows: slice, cols: slice, *, block: int, step: int) -> np.ndarray:
    """Scales [O / block, N] of blocks of outputs, as those of smaller blocks of `step`, which divides `block`."""
    return scales[np.arange(rows.start, rows.stop) * step // block, cols]


def to_row_words(values: np.ndarray) -> np.ndarray:
    """What `row_words` reads from, of values [O, I / 2] two to a byte, or `row_bytes`, of int8 [O, I]."""
    return _words(values if values.dtype == np.uint8 else _biased(values))


def to_column_words(zeros: np.ndarray) -> np.ndarray:
    """What `row_zeros` reads from, of uint8 [O, N], or `row_byte_zeros`, of int8 [O, N]."""
    columns = zeros.T
    if columns.dtype == np.int8:
        return _words(_biased(columns)).T.copy()
    columns = np.pad(columns, ((0, 0), (0, columns.shape[1] % 2)))
    return _words(columns[:, ::2] | columns[:, 1::2] << 4).T.copy()


def in_order(values: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """int8 values [O, I], or two to a byte, of which each is that input, in the order of the inputs."""
    places = np.argsort(inputs)
    return values[:, places] if values.dtype == np.int8 else _pairs(values, places)


def _nibbles(words: np.ndarray) -> np.ndarray:
    """[A, B] words as uint8 [A, 8 B], the lowest four bits first."""
    pairs = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(len(words), -1)


def _row_bytes(words: np.ndarray) -> np.ndarray:
    """[I / n, O] words as the bytes of their outputs, [O, 4 I / n], the lowest first."""
    return np.ascontiguousarray(words.T).view(np.uint8)


def _numbers(stored: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """Those inputs of bytes [O, I / 2], each of two numbers, the even one in the low four bits."""
    return np.take(stored, inputs // 2, axis=1) >> (4 * (inputs % 2)).astype(np.uint8) & 15


def _pairs(stored: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """The same, two to a byte."""
    return _numbers(stored, inputs[::2]) | _numbers(stored, inputs[1::2]) << 4


def _signed(stored: np.ndarray) -> np.ndarray:
    """Bytes that are 128 higher than the numbers they stand for, as int8."""
    return (stored ^ np.uint8(128)).view(np.int8)


def _biased(values: np.ndarray) -> np.ndarray:
    """int8 numbers as bytes that are 128 higher."""
    return values.view(np.uint8) ^ np.uint8(128)


def _words(stored: np.ndarray) -> np.ndarray:
    """Bytes [A, B] as int32 [A, B / 4], the last filled up with zeros."""
    return np.ascontiguousarray(np.pad(stored, ((0, 0), (0, -stored.shape[1] % 4)))).view(np.int32)
