"""How long the phases of a request take at best: the roofline model over counts.

Source: Williams, Waterman and Patterson 2009, "Roofline": arithmetic and memory traffic overlap, so a step takes the
longer of the two. Collectives between layers overlap with neither and are added.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from ..model import arguments
from .counts import Counts, count_decode, count_prefill
from .deployment import Deployment
from .hardware import Hardware

_HARDWARE = arguments.instance(Hardware, hint="such as find_hardware('h100')")
_STEP = {
    "deployment": arguments.instance(Deployment),
    "hardware": _HARDWARE,
    "batch": arguments.whole,
    "efficiency": arguments.number,
}


@dataclasses.dataclass(frozen=True)
class Phase:
    """The time of a step, or of several one after the other, on each of the devices.

    Attributes:
      counts: FLOPs and bytes of one device.
      compute_seconds, memory_seconds, communication_seconds: what each would take alone.
      seconds: the longer of the first two, and the third; summed over the steps.
      ridge: FLOP a byte at which the first two are equal.
      mfu: model FLOPs utilization, FLOP/s achieved over the peak. FLOP a token is no rate: an 8 B model's 16 GFLOP a
        token at 125 tokens/s are 2 TFLOP/s, 0.64 % of an A100, and not the 16 GFLOP/s and 0.005 % of some texts.
      mbu: memory bandwidth utilization, bytes/s achieved over the bandwidth.
    """

    counts: Counts
    compute_seconds: float
    memory_seconds: float
    communication_seconds: float
    seconds: float
    ridge: float
    mfu: float
    mbu: float

    @property
    def intensity(self) -> float:
        """FLOP a byte."""
        return self.counts.intensity

    @property
    def flops_per_second(self) -> float:
        """FLOP/s of one device over the whole of the time."""
        return self.counts.flops / self.seconds

    def measured(self, seconds: float) -> "Phase":
        """The same steps in the time that they were measured to take: its MFU and MBU are those reached."""
        slower = seconds / self.seconds
        return dataclasses.replace(self, seconds=seconds, mfu=self.mfu / slower, mbu=self.mbu / slower)

    @property
    def bound(self) -> Literal["compute", "bandwidth", "communication"]:
        """What takes longest."""
        seconds = {
            "compute": self.compute_seconds,
            "bandwidth": self.memory_seconds,
            "communication": self.communication_seconds,
        }
        return max(seconds, key=seconds.__getitem__)


@arguments.arguments(
    steps=arguments.instance(Counts, list, tuple, hint="as count_step returns it"),
    hardware=_HARDWARE,
    dtype=arguments.text,
    tensor=arguments.whole,
    efficiency=arguments.number,
)
def predict(
    steps: Counts | Sequence[Counts],
    hardware: Hardware,
    dtype: str,
    *,
    tensor: int = 1,
    efficiency: int | float = 1.0,
) -> Phase:
    """The time of steps whose counts are known.

    Args:
      steps: counts of one device, of one step or of several that follow each other.
      hardware: each device.
      dtype: in which products are made: that of the activations, to which quantized weights are widened.
      tensor: devices that share every layer, or the experts of some.
      efficiency: fraction of every peak that is reached; 1 is the roof itself.

    Raises:
      ValueError: an efficiency outside (0, 1], a dtype that the hardware has no peak for, or no link between devices.
    """
    if not 0 < efficiency <= 1:
        raise ValueError(f"efficiency is {efficiency}; it must be above 0 and at most 1")
    steps = [steps] if isinstance(steps, Counts) else list(steps)
    for step in steps:
        arguments.instance(Counts, hint="as count_step returns it")("predict: steps", step)
    peak, bandwidth = hardware.peak(dtype), hardware.bandwidth
    compute = [step.flops / peak / efficiency for step in steps]
    memory = [step.bytes / bandwidth / efficiency for step in steps]
    links = [
        hardware.all_reduce_seconds(tensor, step.collectives.bytes, step.all_reduces) / efficiency for step in steps
    ]
    total = sum(steps, Counts())
    seconds = sum(max(pair) for pair in zip(compute, memory, strict=True)) + sum(links)
    return Phase(
        counts=total,
        compute_seconds=sum(compute),
        memory_seconds=sum(memory),
        communication_seconds=sum(links),
        seconds=seconds,
        ridge=hardware.ridge(dtype),
        mfu=total.flops / peak / seconds,
        mbu=total.bytes / bandwidth / seconds,
    )


@arguments.arguments(**_STEP, prompt=arguments.whole, chunk=arguments.optional(arguments.whole))
def predict_prefill(
    deployment: Deployment,
    hardware: Hardware,
    *,
    batch: int,
    prompt: int,
    chunk: int | None = None,
    efficiency: int | float = 1.0,
) -> Phase:
    """Prefill of prompts; its seconds are the time to the first token (TTFT) of all rows.

    Args:
      deployment, hardware: the model on its devices.
      batch: rows, prefilled together.
      prompt: tokens a row.
      chunk: longest run of the program, in tokens a row; by default the whole prompt is one.
      efficiency: as in `predict`.

    Raises:
      ValueError: a size out of range, or what `predict` refuses.
    """
    chunk = prompt if chunk is None else chunk
    if prompt < 1 or chunk < 1:
        raise ValueError(f"prompt is {prompt} and chunk {chunk}; both must be at least 1")
    steps = [count_prefill(deployment, batch, min(chunk, prompt - at), at) for at in range(0, prompt, chunk)]
    return predict(steps, hardware, deployment.config.dtype, tensor=deployment.devices, efficiency=efficiency)


@arguments.arguments(**_STEP, context=arguments.whole)
def predict_decode(
    deployment: Deployment, hardware: Hardware, *, batch: int, context: int, efficiency: int | float = 1.0
) -> Phase:
    """One decode step; its seconds are the time per output token (TPOT) of every row.

    Args:
      deployment, hardware: the model on its devices.
      batch: rows.
      context: positions that each new token sees, itself included.
      efficiency: as in `predict`.

    Raises:
      ValueError: a size out of range, or what `predict` refuses.
    """
    counts = count_decode(deployment, batch, context)
    return predict(counts, hardware, deployment.config.dtype, tensor=deployment.devices, efficiency=efficiency)


@dataclasses.dataclass(frozen=True)
class Generation:
    """A batch of requests from prompt to last token.

    Attributes:
      prefill: the prompts; their seconds are the TTFT.
      decode: all steps after it. The first new token comes from prefill's logits.
      new_tokens: a row.
    """

    prefill: Phase
    decode: Phase
    new_tokens: int

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    @property
    def tpot(self) -> float:
        """Mean seconds of a token after the first."""
        return self.decode.seconds / (self.new_tokens - 1)

    @property
    def decode_fraction(self) -> float:
        """Of the time."""
        return self.decode.seconds / self.seconds


@arguments.arguments(
    **_STEP,
    prompt=arguments.whole,
    new_tokens=arguments.whole,
    chunk=arguments.optional(arguments.whole),
)
def predict_generation(
    deployment: Deployment,
    hardware: Hardware,
    *,
    batch: int,
    prompt: int,
    new_tokens: int,
    chunk: int | None = None,
    efficiency: int | float = 1.0,
) -> Generation:
    """Prompts and the tokens after them, the cache growing all the while.

    Args:
      deployment, hardware, batch, prompt, chunk, efficiency: as in `predict_prefill`.
      new_tokens: a row, at least 2.

    Raises:
      ValueError: a size out of range, or what `predict` refuses.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens is {new_tokens}; it must be at least 2, since prefill yields the first")
    prefill = predict_prefill(deployment, hardware, batch=batch, prompt=prompt, chunk=chunk, efficiency=efficiency)
    steps = [count_decode(deployment, batch, prompt + made) for made in range(1, new_tokens)]
    dtype, tensor = deployment.config.dtype, deployment.devices
    return Generation(prefill, predict(steps, hardware, dtype, tensor=tensor, efficiency=efficiency), new_tokens)


@arguments.arguments(price_per_hour=arguments.number, tokens_per_second=arguments.number)
def cost_per_million(price_per_hour: int | float, tokens_per_second: int | float) -> float:
    """Price of a million tokens, in the currency of the price.

    Args:
      price_per_hour: of all devices together.
      tokens_per_second: of all rows together.

    Raises:
      TypeError, ValueError: an argument that is no number, or a rate that is not positive.
    """
    if tokens_per_second <= 0:
        raise ValueError(f"tokens_per_second is {tokens_per_second}; it must be positive")
    return price_per_hour / 3600 / tokens_per_second * 1e6
