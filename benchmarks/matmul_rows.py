"""The products that are measured and compiled: a layer's four weights, of three models, in every form."""

import dataclasses
import functools
import math

FORMS = {  # dtype of the values, inputs a scale (None: all), dtype of the scales, whether there are zero points
    "bf16": ("bfloat16", None, None, False),
    "int8": ("int8", None, "float32", False),
    "fp8": ("float8_e4m3fn", None, "float32", False),
    "fp8-block": ("float8_e4m3fn", 128, "float32", False),
    "int4": ("uint8", 128, "bfloat16", False),
    "int4-32": ("uint8", 32, "bfloat16", False),
    "int4-32-zero": ("uint8", 32, "float32", True),
}
BLOCK_ROWS = 128  # outputs that share a scale in "fp8-block"
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1, "float8_e4m3fn": 1}

Shapes = dict[str, tuple[tuple[int, ...], str]]


@dataclasses.dataclass(frozen=True)
class Row:
    """M rows of bfloat16 by a weight of N outputs and K inputs; N counts the gate's where it is `gated`.
    `residual` is added to the result.
    """

    weight: str
    N: int
    K: int
    M: int
    form: str = "bf16"
    gated: bool = False
    residual: bool = False

    def __str__(self) -> str:
        return f"matmul {self.weight} {self.M} x {self.N} x {self.K} {self.form}"

    @property
    def outputs(self) -> int:
        return self.N // 2 if self.gated else self.N

    @property
    def operands(self) -> Shapes:
        """Shape and dtype of each array that `matmul` takes."""
        values, group, scale, zeros = FORMS[self.form]
        lead = (2, self.outputs) if self.gated else (self.N,)
        operands: Shapes = {
            "x": ((self.M, self.K), "bfloat16"),
            "values": ((*lead, self.K // 2 if values == "uint8" else self.K), values),
        }
        if scale is not None:
            rows = lead[-1] // BLOCK_ROWS if self.form == "fp8-block" else lead[-1]
            grid = (*lead[:-1], rows, 1 if group is None else self.K // group)
            operands["scales"] = (grid, scale)
            if zeros:
                operands["zeros"] = (grid, "uint8")
        if self.residual:
            operands["residual"] = ((self.M, self.outputs), "bfloat16")
        return operands

    @property
    def bytes(self) -> int:
        """That the product has to move: every operand and the result, once each."""
        operands = sum(math.prod(shape) * ITEMSIZE[dtype] for shape, dtype in self.operands.values())
        return operands + self.M * self.outputs * 2

    @property
    def flops(self) -> int:
        return 2 * self.M * self.N * self.K


def layer(model: str, D: int, F: int, K: int, G: int, H: int, tensor: int = 1) -> list[functools.partial]:
    """The four products of a layer of D embed, F ffn, K KV heads, G queries a KV head, H head dim, on one device."""
    heads, ffn = K // tensor, F // tensor
    name = f"{model} tensor {tensor}" if tensor > 1 else model
    return [
        functools.partial(Row, f"{name} qkv", heads * (G + 2) * H, D),
        functools.partial(Row, f"{name} out", D, heads * G * H, residual=True),
        functools.partial(Row, f"{name} gate_up", 2 * ffn, D, gated=True),
        functools.partial(Row, f"{name} down", D, ffn, residual=True),
    ]


LAYERS = {
    "1b": layer("1b", 2048, 8192, 8, 4, 64),
    "8b": layer("8b", 4096, 14336, 8, 4, 128),
    "70b tensor 4": layer("70b", 8192, 28672, 8, 8, 128, tensor=4),
    "70b tensor 8": layer("70b", 8192, 28672, 8, 8, 128, tensor=8),
}
MEASURED_ROWS = (1, 4, 16, 64)


def rows(models: tuple[str, ...], counts: tuple[int, ...], forms: tuple[str, ...] = tuple(FORMS)) -> list[Row]:
    """Row by row every form of a product, bf16 first, to which the others are compared."""
    return [product(M=M, form=form) for model in models for product in LAYERS[model] for M in counts for form in forms]


QUICK = [row for row in rows(("8b",), MEASURED_ROWS, ("bf16", "int8", "int4")) if row.gated or row.M in (1, 16)]
TINY = [Row("tiny", 256, 256, 1, form, gated=True) for form in FORMS]


def full() -> list[Row]:
    return list(dict.fromkeys([*QUICK, *rows(("8b",), MEASURED_ROWS), *rows(tuple(LAYERS), (1, 16))]))
