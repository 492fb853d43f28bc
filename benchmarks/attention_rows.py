"""What `attention.py` measures: the cases, most telling first, and the bytes and FLOPs that each needs."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

ITEMSIZE = {"bf16": 2, "f16": 2, "int8": 1, "fp8": 1}
MODEL_8B, MODEL_70B, SHARD_70B = (8, 4, 128), (8, 8, 128), (1, 8, 128)  # K, G, H; the last is one of 8 shards
MHA, WIDE = (32, 1, 128), (4, 8, 256)
LEVEL = 0.98  # of cuDNN's speed: within the noise of it


@dataclasses.dataclass(frozen=True)
class Row:
    """One attention: of `lengths` cached positions a row, the T newest asking; shape is K KV heads, G queries each, H
    dims. S is the positions a page, `kv` the pages' dtype, `q` the queries'.
    """

    lengths: tuple[int, ...]
    T: int = 1
    shape: tuple[int, int, int] = MODEL_8B
    kv: str = "bf16"
    S: int = 64
    op: str = "decode"
    q: str = "bf16"
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False

    def __str__(self) -> str:
        B, longest = len(self.lengths), max(self.lengths)
        if not self.even:
            batch = f"1 x {_short(longest)} + {B - 1} x {_short(min(self.lengths))}"
        else:
            batch = f"{B} x {_short(self.T if self.op == 'prefill' else longest)}"
        over = f" over {_short(longest - self.T)}" if self.op == "prefill" and longest > self.T else ""
        options = "".join(f", {name}" for name in ("window", "soft_cap", "sinks") if getattr(self, name))
        return f"{self.op} {batch}{over}, {'x'.join(map(str, self.shape))}, {self.kv}, page {self.S}{options}"

    @property
    def even(self) -> bool:
        return len(set(self.lengths)) == 1

    @property
    def bytes(self) -> int:
        """That must be moved: K, V and their float32 scales once, queries once, the output once."""
        K, G, H = self.shape
        position = 2 * K * (H * ITEMSIZE[self.kv] + (4 if ITEMSIZE[self.kv] == 1 else 0))
        return sum(self.lengths) * position + 2 * len(self.lengths) * self.T * K * G * H * 2

    @property
    def flops(self) -> int:
        """Of the two products, over the positions that each query sees."""
        K, G, H = self.shape
        seen = sum(self.T * (length - self.T) + self.T * (self.T + 1) // 2 for length in self.lengths)
        return 4 * K * G * H * seen


def target_of(row: Mapping[str, Any]) -> float | None:
    """What share of the measured bandwidth a decode is to reach, by its stored record, where there is a target."""
    long = row["op"] == "decode" and len(set(row["lengths"])) == 1 and row["lengths"][0] >= 32768
    return {"bf16": 0.92, "fp8": 0.87}.get(row["kv"]) if long else None


def _short(positions: int) -> str:
    return f"{positions // 1024}k" if positions % 1024 == 0 else str(positions)


def decode(batch: int, context: int, shape: tuple[int, int, int] = MODEL_8B, **options: Any) -> Row:
    return Row((context,) * batch, shape=shape, **options)


def prefill(batch: int, tokens: int, shape: tuple[int, int, int] = MODEL_8B, context: int = 0, **options: Any) -> Row:
    return Row((context + tokens,) * batch, T=tokens, shape=shape, op="prefill", **options)


SKEWED = Row((128 * 1024, *[4096] * 31))
EVEN = decode(32, sum(SKEWED.lengths) // 32)  # of as many bytes
SKEW_TARGET = 1.10  # times the even one's

QUICK = [
    decode(32, 32768),
    decode(32, 32768, kv="fp8"),
    EVEN,
    SKEWED,
    prefill(1, 8192),
    decode(32, 32768, MODEL_70B),
    prefill(1, 2048, context=32768),
    decode(64, 32768, SHARD_70B),
    decode(32, 32768, kv="int8"),
    decode(8, 131072),
    prefill(1, 16384, MODEL_70B),
    decode(32, 4096),
    decode(32, 32768, WIDE),
    prefill(4, 1024),
    decode(8, 32768, MHA),
    decode(1, 32768),
    prefill(1, 8192, kv="fp8"),
    decode(32, 32768, S=16),
]

TINY = [
    decode(2, 256),
    decode(2, 256, kv="int8", S=32),
    decode(2, 256, SHARD_70B, kv="fp8", S=16),
    Row((1024, 32, 32, 32), shape=(2, 4, 64)),
    decode(4, 280, (2, 4, 64)),
    prefill(1, 128),
    prefill(2, 64, (2, 4, 64), context=128, kv="fp8"),
]
"""For a CPU."""


def full() -> list[Row]:
    """The quick rows and the sweep, of at most 2**20 cached positions of an 8B or as many bytes."""
    return list(dict.fromkeys([*QUICK, *_sweep()]))


def _sweep() -> Iterator[Row]:
    contexts, few = [1024 * 2**n for n in range(8)], (1024, 8192, 32768, 131072)
    for batch in (1, 8, 32, 128):
        yield from (decode(batch, context) for context in contexts if batch * context <= 2**20)
    for shape in (MODEL_70B, SHARD_70B, MHA, WIDE):
        most = 2**30 // (shape[0] * shape[2])  # positions
        for context in few:
            yield decode(max(1, min(64, most // context)), context, shape)
    for kv in ("int8", "fp8"):
        yield from (decode(min(32, 2**20 // context), context, kv=kv) for context in few)
        for batch, shape in ((32, MODEL_70B), (64, SHARD_70B), (32, WIDE)):
            yield decode(batch, 32768, shape, kv=kv)
    for kv in ("bf16", "int8", "fp8"):
        yield from (decode(32, 32768, kv=kv, S=S) for S in (16, 32, 64, 128))
    for shape in (MODEL_8B, MODEL_70B, SHARD_70B, MHA, WIDE):
        for tokens in (512, 1024, 2048, 4096, 8192, 16384):
            yield prefill(max(1, 4096 // tokens), tokens, shape)
    for kv in ("int8", "fp8"):
        yield from (prefill(max(1, 4096 // tokens), tokens, kv=kv) for tokens in (1024, 4096, 16384))
    for tokens in (512, 2048):
        yield from (prefill(1, tokens, context=context) for context in (8192, 32768, 131072))
