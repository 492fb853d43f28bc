"""How weights are stored in fewer bits: the schemes, by name, and which of a model's weights have one."""

import dataclasses
import math
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one matrix [*out, *in] is stored: a weight is (value - zero) * scale. Static under jit.

    Attributes:
      dtype: of the values: "int8", "float8_e4m3fn", or, two to a byte, "int4" or "float4_e2m1fn", which is a sign and
        one of 0, 0.5, 1, 1.5, 2, 3, 4, 6.
      group: consecutive inputs that share a scale, the last group may be shorter; None is all of them.
      rows: consecutive outputs that share it. A last output axis that `rows` does not divide has blocks of their
        greatest common divisor.
      zero_points: whether a group has a zero point (integers alone); without one the values are symmetric about zero.
      scale_dtype: of the scales; "float8_e8m0fnu" is a power of two, which is held as its byte, the exponent plus 127.
      sorted_inputs: whether the inputs are stored in another order, sorted so that each group lies together.
      dynamic: whether products with many rows (prefill) round activations to `dtype` too, a scale a row, so that they
        run at the rate of 8-bit products.
      static: whether they do so by one scale, which was measured beforehand and is stored with the weight.
    """

    dtype: Literal["int8", "int4", "float8_e4m3fn", "float4_e2m1fn"]
    group: int | None = None
    rows: int = 1
    zero_points: bool = False
    scale_dtype: str = "float32"
    dynamic: bool = False
    sorted_inputs: bool = False
    static: bool = False

    @property
    def packed(self) -> bool:
        """Whether two values share a byte."""
        return self.dtype in ("int4", "float4_e2m1fn")

    @property
    def scales_outputs(self) -> bool:
        """Whether a product may take the values as they are, and multiply its outputs by the scales afterwards."""
        return self.group is None and not self.packed and not self.zero_points

    def block_rows(self, outputs: int) -> int:
        """Outputs that share a scale where the last output axis has so many."""
        return math.gcd(self.rows, outputs)

    def groups(self, inputs: int) -> int:
        """Scales along so many inputs."""
        return 1 if self.group is None else math.ceil(inputs / self.group)


SCHEMES: dict[str, Scheme] = {
    "int8": Scheme("int8"),
    "int8-dynamic": Scheme("int8", dynamic=True),
    "fp8": Scheme("float8_e4m3fn"),
    "fp8-dynamic": Scheme("float8_e4m3fn", dynamic=True),
    "fp8-block": Scheme("float8_e4m3fn", group=128, rows=128),
    "int4": Scheme("int4", group=128, scale_dtype="bfloat16"),
    "int4-64": Scheme("int4", group=64, scale_dtype="bfloat16"),
    "int4-32": Scheme("int4", group=32, scale_dtype="bfloat16"),
    "int4-zero": Scheme("int4", group=128, zero_points=True),
    "int4-64-zero": Scheme("int4", group=64, zero_points=True),
    "int4-32-zero": Scheme("int4", group=32, zero_points=True),
    "mxfp4": Scheme("float4_e2m1fn", group=32, scale_dtype="float8_e8m0fnu"),
}
"""Weights in 8 bits with a scale an output channel or a 128 x 128 block, in 4 bits with a scale a group of inputs."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """Which of a model's weights are stored in which scheme. Embeddings, norms and biases never are.

    Attributes:
      layers: of the matrices of the layers; None leaves them as they are.
      output: of the output projection; None leaves it as it is. Where it is tied to the embedding, a quantized copy is
        kept beside the embedding, whose rows are still looked up.
      skip: parameters left as they are, by dotted name, such as "layers.0.down".
    """

    layers: Scheme | None = None
    output: Scheme | None = None
    skip: tuple[str, ...] = ()

    def scheme_of(self, name: str) -> Scheme | None:
        """The scheme of the matrix of that dotted name."""
        return None if name in self.skip else self.output if name == "unembedding" else self.layers


def quantization(layers: str | None, output: str | None = None) -> Quantization | None:
    """The quantization of the layers and of the output projection, each by its scheme's name; None without any.

    Raises:
      ValueError: an unknown scheme.
    """
    if layers is None and output is None:
        return None
    return Quantization(*(None if name is None else scheme(name) for name in (layers, output)))


def scheme(name: str) -> Scheme:
    """The scheme of that name.

    Raises:
      ValueError: there is none.
    """
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"quantization scheme {name!r} is not known; known: {', '.join(SCHEMES)}")
    return SCHEMES[name]
