"""The products that are measured and compiled: a layer's weights, of dense models and of experts, in every form."""

import dataclasses
import functools
import math

import numpy as np

FORMS = {  # dtype of the values, inputs a scale (None: all), dtype of the scales, whether there are zero points
    "bf16": ("bfloat16", None, None, False),
    "int8": ("int8", None, "float32", False),
    "fp8": ("float8_e4m3fn", None, "float32", False),
    "fp8-block": ("float8_e4m3fn", 128, "float32", False),
    "int4": ("uint8", 128, "bfloat16", False),
    "int4-32": ("uint8", 32, "bfloat16", False),
    "mxfp4": ("uint8", 32, "float8_e8m0fnu", False),
    "int4-32-zero": ("uint8", 32, "float32", True),
}
BLOCK_ROWS = 128  # outputs that share a scale in "fp8-block"
ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e8m0fnu": 1}

Shapes = dict[str, tuple[tuple[int, ...], str]]


@dataclasses.dataclass(frozen=True)
class Row:
    """M rows of bfloat16 by a weight of N outputs and K inputs; N counts the gate's where it is `gated`.
    `residual` is added to the result. With `experts` they are many weights, and each token has a row with `top_k` of
    them.
    """

    weight: str
    N: int
    K: int
    M: int
    form: str = "bf16"
    gated: bool = False
    residual: bool = False
    experts: int = 0
    top_k: int = 1

    def __str__(self) -> str:
        weights = f"{self.experts} x " * (self.experts > 0)
        return f"matmul {self.weight} {self.M} x {weights}{self.N} x {self.K} {self.form}"

    @property
    def outputs(self) -> int:
        return self.N // 2 if self.gated else self.N

    @property
    def operands(self) -> Shapes:
        """Shape and dtype of each array that `matmul` takes."""
        values, group, scale, zeros = FORMS[self.form]
        lead: tuple[int, ...] = (2, self.outputs) if self.gated else (self.N,)
        lead = (self.experts, *lead) if self.experts else lead
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
        """That the product has to move: every operand, of weights those that are hit, and the result, once each."""
        sizes = {name: math.prod(shape) * ITEMSIZE[dtype] for name, (shape, dtype) in self.operands.items()}
        rows = sizes.pop("x") + sizes.pop("residual", 0) + self.M * self.outputs * 2
        if self.experts:
            hit = int(np.count_nonzero(self.sizes))
            return rows + sum(sizes.values()) // self.experts * hit
        return rows + sum(sizes.values())

    @property
    def sizes(self) -> np.ndarray:
        """Rows of each expert, where all are as likely and a token never has the same one twice."""
        rng = np.random.default_rng(0)
        tokens = [rng.permutation(self.experts)[: self.top_k] for _ in range(self.M // self.top_k)]
        return np.bincount(np.concatenate(tokens), minlength=self.experts)

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


def experts(model: str, D: int, F: int, experts: int, top_k: int) -> list[functools.partial]:
    """Both products of a layer of experts of D embed and F ffn; M counts rows, which are `top_k` a token."""
    shared = {"experts": experts, "top_k": top_k}
    return [
        functools.partial(Row, f"{model} gate_up", 2 * F, D, **shared),
        functools.partial(Row, f"{model} down", D, F, **shared),
    ]


EXPERTS = {
    "mixtral-8x7b": experts("mixtral-8x7b", 4096, 14336, 8, 2),
    "qwen3-30b-a3b": experts("qwen3-30b-a3b", 2048, 768, 128, 8),
    "qwen3-235b-a22b": experts("qwen3-235b-a22b", 4096, 1536, 128, 8),
    "gpt-oss-120b": experts("gpt-oss-120b", 2880, 2880, 128, 4),
    "deepseek-v3": experts("deepseek-v3", 7168, 2048, 256, 8),
}
MEASURED_TOKENS = (1, 8, 64, 4096)


def rows(models: tuple[str, ...], counts: tuple[int, ...], forms: tuple[str, ...] = tuple(FORMS)) -> list[Row]:
    """Row by row every form of a product, bf16 first, to which the others are compared."""
    return [product(M=M, form=form) for model in models for product in LAYERS[model] for M in counts for form in forms]


def expert_rows(
    models: tuple[str, ...], tokens: tuple[int, ...], forms: tuple[str, ...] = ("bf16", "int8", "fp8", "int4", "mxfp4")
) -> list[Row]:
    """The same for experts. The kernel takes no 2,880 inputs of 4 bits, gpt-oss-120b's."""
    products = [(product, product.keywords["top_k"]) for model in models for product in EXPERTS[model]]
    rows = [product(M=top_k * n, form=form) for product, top_k in products for n in tokens for form in forms]
    return [row for row in rows if row.form != "int4" or row.K % 128 == 0]


QUICK = [row for row in rows(("8b",), MEASURED_ROWS, ("bf16", "int8", "int4")) if row.gated or row.M in (1, 16)]
TINY = [*(Row("tiny", 256, 256, 1, form, gated=True) for form in FORMS), Row("tiny", 256, 256, 8, experts=8, top_k=2)]


def full() -> list[Row]:
    dense = [*QUICK, *rows(("8b",), MEASURED_ROWS), *rows(tuple(LAYERS), (1, 16))]
    return list(dict.fromkeys([*dense, *expert_rows(tuple(EXPERTS), MEASURED_TOKENS)]))
