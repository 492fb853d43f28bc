"""FLOPs and bytes of one step of a model, part by part, from its parameters and configuration alone.

A step is one run of the compiled program: a prefill chunk, or a decode step. What is counted is what the program has to
do: every weight read once, every visible key and value read once, every product's operands and result moved once, and
element-wise work fused into its neighbors. FLOPs are those of the matrix products, two for each multiply-add, and of
attention over visible keys only. Norms, rotations, activations and softmax are left out: about 1 % of a model of 256
dimensions, less of a larger one. All counts are those of one device.
"""

import collections
import dataclasses

import jax.numpy as jnp

from ..model import arguments
from ..model.config import LayerConfig
from .deployment import Deployment

_SIZES = {"deployment": arguments.instance(Deployment), "batch": arguments.whole}
_PARTS = ("weights", "kv_read", "kv_write", "activations", "logits")


@dataclasses.dataclass(frozen=True)
class Part:
    """FLOPs, and bytes to and from memory, of one part of a step."""

    flops: int = 0
    bytes: int = 0

    def __add__(self, other: "Part") -> "Part":
        return Part(self.flops + other.flops, self.bytes + other.bytes)


@dataclasses.dataclass(frozen=True)
class Counts:
    """What one device does in a step, or in several.

    Attributes:
      weights: parameters read, and the products with them. Of the embedding the rows of the tokens are read; the
        output matrix, which may be the same one, is read whole; of routed experts those that the tokens are expected
        to have.
      kv_read: keys and values that the new tokens see, their own included, and attention's arithmetic.
      kv_write: keys and values of the new tokens.
      activations: operands and results of the products, and the residual stream.
      logits: the float32 logits, written.
      collectives: bytes of the all-reduces' operands, in the model's dtype; they go over links, not to memory. (Dynamic
        schemes exchange more in prefill: int32 sums, and the scales of activations.)
      all_reduces: how many.
      tokens: new tokens, all rows together.
    """

    weights: Part = Part()
    kv_read: Part = Part()
    kv_write: Part = Part()
    activations: Part = Part()
    logits: Part = Part()
    collectives: Part = Part()
    all_reduces: int = 0
    tokens: int = 0

    @property
    def flops(self) -> int:
        return sum(getattr(self, name).flops for name in _PARTS)

    @property
    def bytes(self) -> int:
        """To and from memory."""
        return sum(getattr(self, name).bytes for name in _PARTS)

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.flops / self.bytes

    def __add__(self, other: "Counts") -> "Counts":
        fields = [field.name for field in dataclasses.fields(self)]
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in fields})


@arguments.arguments(**_SIZES, context=arguments.whole)
def count_decode(deployment: Deployment, batch: int, context: int) -> Counts:
    """One decode step.

    Args:
      deployment: the model on its devices.
      batch: rows, one new token each.
      context: positions that each new token sees, itself included: one more than are cached before.
    """
    return count_step(deployment, batch, tokens=1, cached=context - 1)


@arguments.arguments(**_SIZES, tokens=arguments.whole, cached=arguments.whole)
def count_prefill(deployment: Deployment, batch: int, tokens: int, cached: int = 0) -> Counts:
    """One prefill chunk, which yields the logits after its last token; arguments as in `count_step`."""
    return count_step(deployment, batch, tokens, cached)


@arguments.arguments(**_SIZES, tokens=arguments.whole, cached=arguments.whole, scored=arguments.whole)
def count_step(deployment: Deployment, batch: int, tokens: int, cached: int = 0, scored: int = 1) -> Counts:
    """One run of a program.

    Args:
      deployment: the model on its devices.
      batch: rows.
      tokens: new tokens a row.
      cached: positions a row holds before.
      scored: tokens a row whose logits are made: 1, or all when a draft's tokens are verified.

    Raises:
      TypeError, ValueError: a size out of range, or rows longer than the model's `max_position`.
    """
    config = deployment.config
    for name, value, least in (
        ("batch", batch, 1),
        ("tokens", tokens, 1),
        ("cached", cached, 0),
        ("scored", scored, 1),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}")
    if cached + tokens > config.max_position:
        raise ValueError(
            f"{cached} cached and {tokens} new tokens are {cached + tokens}, and the model was made for at most "
            f"{config.max_position}; take fewer"
        )
    n, element = deployment.tensor, jnp.dtype(config.dtype).itemsize
    D, V, H, L = config.embed_dim, -(-config.vocab_size // n), config.head_dim, config.num_layers
    K, G = deployment.kv_heads, deployment.q_per_kv
    rows, scored_rows = batch * tokens, batch * scored

    untied = deployment.embedding_bytes if config.has_unembedding else 0
    layers = config.layers
    windows = [layer.window for layer in layers]
    pairs = kv_read = 0
    for (window, kv), count in collections.Counter(zip(windows, deployment.kv_bytes_by_layer, strict=True)).items():
        pairs += count * _visible_pairs(tokens, cached, window)
        keys = cached + tokens if window is None else min(cached + tokens, window - 1 + tokens)
        kv_read += count * keys * kv

    # Attention, dense MLPs and the embedding are added up over the devices that share them; experts over all.
    routed = sum(layer.mlp == "experts" for layer in layers)
    reductions = (n > 1) * (2 * L - routed + 1) + (deployment.devices > 1) * routed
    qkv, queries = K * (G + 2) * H, K * G * H
    # A layer: the input of qkv, its result written and read, attention's output written and read; the residual stream
    # is read and written by each of the two blocks.
    elements = L * (D + 2 * qkv + 2 * queries + 4 * D) + D + sum(_mlp_elements(deployment, layer) for layer in layers)
    return Counts(
        weights=Part(
            flops=2 * rows * deployment.matrix_elements + 2 * scored_rows * V * D,
            bytes=deployment.weight_bytes_read(rows) - untied + rows * D * element,
        ),
        kv_read=Part(flops=4 * batch * pairs * K * G * H, bytes=batch * kv_read),
        kv_write=Part(bytes=rows * deployment.kv_bytes_per_token),
        activations=Part(bytes=(rows * elements + scored_rows * D) * element),
        logits=Part(bytes=scored_rows * V * 4),
        collectives=Part(bytes=rows * D * reductions * element),
        all_reduces=reductions,
        tokens=rows,
    )


def _mlp_elements(deployment: Deployment, layer: LayerConfig) -> int:
    """What an MLP moves of a token: the input of gate_up, gate and up written and read, by each expert that it has.

    What several experts yield is written and read once more, to be added up. Groups of devices have equal shares.
    """
    config, experts, n = deployment.config, deployment.config.experts, deployment.tensor
    if layer.mlp == "dense":
        return config.embed_dim + 4 * config.ffn_dim // n
    routed = experts.per_token * (3 * config.embed_dim + 4 * experts.ffn_dim // n) // deployment.expert
    return routed + (config.embed_dim + 4 * experts.shared_ffn_dim // n if experts.shared_ffn_dim else 0)


def _visible_pairs(tokens: int, cached: int, window: int | None) -> int:
    """Pairs of a new token and a position that it sees: sum of min(p + 1, window) over its positions p."""

    def below(end: int) -> int:  # of the tokens at positions 0 to end - 1
        full = end if window is None else min(end, window)
        return full * (full + 1) // 2 + (0 if window is None else (end - full) * window)

    return below(cached + tokens) - below(cached)
