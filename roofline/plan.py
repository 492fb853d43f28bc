"""What a model does on a machine, for a grid of tensor degrees and batches: whether it fits, and how fast it is."""

import dataclasses
import functools
from collections.abc import Sequence

from ..model import arguments
from ..model.config import ModelConfig
from ..model.schemes import SCHEMES
from .deployment import Deployment
from .hardware import Hardware
from .predict import Phase, cost_per_million, predict_decode, predict_prefill
from .speculation import Speculation, best_speculation, expected_tokens

_MOST_DEVICES = 64
MOST_DRAFTED = 8
"""Tokens of the longest draft that is looked at."""
_PLANNED = {
    "config": arguments.config,
    "hardware": arguments.instance(Hardware, hint="such as find_hardware('h100')"),
    "context": arguments.whole,
    "weights": arguments.optional(arguments.text),
    "kv": arguments.optional(arguments.text),
    "memory_fraction": arguments.number,
}


@dataclasses.dataclass(frozen=True)
class PlanRow:
    """One tensor degree and batch. Memory is that of one device, in bytes.

    Attributes:
      tensor: devices that share every layer.
      batch: rows.
      weight_bytes, kv_bytes: what weights and cache take.
      free_bytes: what is left of the memory that may be used; negative where they do not fit.
      largest_batch: rows that fit at this context.
      longest_context: positions a row that fit at this batch, at most the model's `max_position`.
      prefill: of the prompts of all rows; None where the row does not fit, as the fields after it.
      decode: the last step, when every row is as long as the context.
      speculation: the fastest round of speculation there, where an acceptance is given.
      cost_input, cost_output: price of a million prompt tokens and of a million new ones; None without a price.
    """

    tensor: int
    batch: int
    weight_bytes: int
    kv_bytes: int
    free_bytes: int
    largest_batch: int
    longest_context: int
    prefill: Phase | None = None
    decode: Phase | None = None
    speculation: Speculation | None = None
    cost_input: float | None = None
    cost_output: float | None = None

    @property
    def fits(self) -> bool:
        return self.free_bytes >= 0

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token."""
        return self.prefill and self.prefill.seconds

    @property
    def tpot(self) -> float | None:
        """Seconds per output token."""
        return self.decode and self.decode.seconds

    @property
    def tokens_per_second(self) -> float | None:
        """Of all rows together; each row, or user, has a `batch`-th of it."""
        return self.decode and self.batch / self.decode.seconds


@arguments.arguments(
    **_PLANNED,
    tensors=arguments.sequence,
    batches=arguments.sequence,
    prompt=arguments.whole,
    chunk=arguments.optional(arguments.whole),
    efficiency=arguments.number,
    price=arguments.optional(arguments.number),
    expert=arguments.whole,
    acceptance=arguments.optional(arguments.number),
    draft=arguments.optional(arguments.config),
)
def plan(
    config: ModelConfig,
    hardware: Hardware,
    *,
    tensors: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    expert: int = 1,
    context: int,
    prompt: int,
    chunk: int | None = None,
    weights: str | None = None,
    kv: str | None = None,
    memory_fraction: int | float = 0.9,
    efficiency: int | float = 1.0,
    price: int | float | None = None,
    acceptance: int | float | None = None,
    draft: ModelConfig | None = None,
) -> list[PlanRow]:
    """The grid of tensor degrees and batches, in the order given.

    Args:
      config, weights, kv: as in `Deployment`.
      hardware: each device.
      tensors: devices that share every layer.
      batches: rows.
      expert: groups of devices that share out the experts of a layer, each of a tensor degree.
      context: positions a row of the cache holds.
      prompt: prompt tokens a row.
      chunk: longest prefill, in tokens; longer prompts run in several.
      memory_fraction: of each device's memory, for weights and cache; programs and temporaries need the rest.
      efficiency: fraction of the peaks that is reached; see `predict`.
      price: of one device for an hour, in any currency.
      acceptance: of a drafted token; see `expected_tokens`.
      draft: a model that drafts, in the same formats and on the same devices, whose memory counts too; None for drafts
        that cost nothing, such as prompt lookup.

    Raises:
      TypeError, ValueError: an argument out of range, or a degree that the model cannot be shared by.
    """
    asked = memory_fraction, efficiency, price, expert, acceptance, draft
    check_plan(config, tensors, batches, context, prompt, weights, kv, *asked)
    usable = memory_fraction * hardware.memory
    rows = []
    for tensor in tensors:
        deployment = Deployment(config, weights, kv, tensor, expert=expert)
        drafting = None if draft is None else Deployment(draft, weights, kv, tensor)
        models = [deployment] if drafting is None else [deployment, drafting]
        weight_bytes = sum(model.parameter_bytes for model in models)
        for batch in batches:
            kv_bytes = sum(model.cache_bytes(batch, context) for model in models)
            row = PlanRow(
                tensor=tensor,
                batch=batch,
                weight_bytes=weight_bytes,
                kv_bytes=kv_bytes,
                free_bytes=int(usable - weight_bytes - kv_bytes),
                largest_batch=deployment.largest_batch(usable, context, drafting),
                longest_context=deployment.longest_context(usable, batch, drafting),
            )
            prefill = predict_prefill(
                deployment, hardware, batch=batch, prompt=prompt, chunk=chunk, efficiency=efficiency
            )
            decode = predict_decode(deployment, hardware, batch=batch, context=context, efficiency=efficiency)
            if row.fits:
                row = dataclasses.replace(row, prefill=prefill, decode=decode)
                if acceptance is not None:
                    # A draft must have room: so near its end no row speculates.
                    room = min(model.config.max_position for model in models) - MOST_DRAFTED
                    sizes = {"batch": batch, "context": max(1, min(context, room)), "efficiency": efficiency}
                    rounds = best_speculation(
                        deployment, drafting, hardware, most=MOST_DRAFTED, acceptance=acceptance, **sizes
                    )
                    row = dataclasses.replace(row, speculation=rounds)
                if price is not None:
                    hourly = price * deployment.devices
                    row = dataclasses.replace(
                        row,
                        cost_input=cost_per_million(hourly, batch * prompt / prefill.seconds),
                        cost_output=cost_per_million(hourly, batch / decode.seconds),
                    )
            rows.append(row)
    return rows


def check_plan(
    config: ModelConfig,
    tensors: Sequence[int],
    batches: Sequence[int],
    context: int,
    prompt: int,
    weights: str | None,
    kv: str | None,
    memory_fraction: int | float,
    efficiency: int | float,
    price: int | float | None,
    expert: int = 1,
    acceptance: int | float | None = None,
    draft: ModelConfig | None = None,
) -> None:
    """ValueError for arguments that `plan` refuses, whatever the hardware."""
    for name, values in (("tensors", tensors), ("batches", batches)):
        for value in values:
            arguments.whole(f"plan: {name}", value)
        if not values or min(values) < 1:
            raise ValueError(f"{name} are {list(values)}; give at least one, each at least 1")
    if not 1 <= context <= config.max_position:
        raise ValueError(
            f"context is {context}; it must be between 1 and {config.max_position}, the longest the model was made for"
        )
    if not 1 <= prompt <= context:
        raise ValueError(f"prompt is {prompt}; it must be between 1 and the context, {context}")
    for name, value in (("memory_fraction", memory_fraction), ("efficiency", efficiency)):
        if not 0 < value <= 1:
            raise ValueError(f"{name} is {value}; it must be above 0 and at most 1")
    if price is not None and not 0 < price < float("inf"):
        raise ValueError(f"price is {price}; it must be positive")
    if expert > 1 and config.experts is None:
        raise ValueError(f"expert is {expert}, and the model has no routed experts; leave it at 1")
    if draft is not None and acceptance is None:
        raise ValueError("a draft model gains by its acceptance; give that too")
    if acceptance is not None:
        expected_tokens(acceptance, 1)
    for tensor in tensors:
        Deployment(config, weights, kv, tensor, expert=expert)
        if draft is not None:
            Deployment(draft, weights, kv, tensor)


@arguments.arguments(**_PLANNED, row=arguments.instance(PlanRow, hint="as plan returns it"))
def remedies(
    config: ModelConfig,
    hardware: Hardware,
    row: PlanRow,
    *,
    context: int,
    weights: str | None = None,
    kv: str | None = None,
    memory_fraction: int | float = 0.9,
) -> list[str]:
    """What would make a row of `plan` fit, each by itself: a smaller batch, a shorter context, devices, a format.

    Args:
      config, hardware, context, weights, kv, memory_fraction: as they were given to `plan`.
      row: that does not fit.

    Returns:
      Such as "batch 12", "context 4,096", "tensor 2", "weights int8"; empty where nothing helps.
    """
    usable = memory_fraction * hardware.memory

    def fits(weights: str | None, tensor: int) -> bool:
        deployment = _deployment(config, weights, kv, tensor)
        return (
            deployment is not None and deployment.parameter_bytes + deployment.cache_bytes(row.batch, context) <= usable
        )

    found = []
    if row.largest_batch:
        found.append(f"batch {row.largest_batch:,}")
    if row.longest_context:
        found.append(f"context {row.longest_context:,}")
    more = range(row.tensor + 1, _MOST_DEVICES + 1) if hardware.link_bandwidth else ()
    tensor = next((tensor for tensor in more if fits(weights, tensor)), None)
    if tensor is not None:
        found.append(f"tensor {tensor}")
    if weights not in SCHEMES:
        scheme = next((scheme for scheme in ("int8", "int4") if fits(scheme, row.tensor)), None)
        if scheme is not None:
            found.append(f"weights {scheme}")
    return found


@functools.lru_cache(maxsize=256)  # every row that does not fit asks for the same ones
def _deployment(config: ModelConfig, weights: str | None, kv: str | None, tensor: int) -> Deployment | None:
    """None where the model cannot be shared by so many devices."""
    try:
        return Deployment(config, weights, kv, tensor)
    except ValueError:
        return None
