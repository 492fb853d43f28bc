"""What a device can do at best: memory, bandwidth, arithmetic and links, with the sources of each figure.

Peaks are dense: data sheets often print twice as much, for matrices of which every other pair of numbers is zero.

Sources of all rows:
  Memory: what the driver reports as usable, as recorded in the device descriptions of the OpenXLA project, where these
  have the card; the data sheet's figure otherwise.
  Links: half of the "bidirectional" or total figure of the data sheets.
  Latency of a collective: the constants that NCCL chooses its algorithms by (src/graph/tuning.cc, ring, LL protocol):
  6.6 us to start, and 0.6 us for each step over NVLink or 1.0 us over PCIe.
"""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Hardware:
    """One device of a host, and its link to the others.

    Attributes:
      name: for people.
      memory: usable bytes.
      bandwidth: of that memory, bytes/s.
      peaks: dense FLOP/s (operations/s for int8) by dtype: some of "float32" (outside tensor cores), "tf32",
        "bfloat16", "float16", "fp8", "int8", with float32 sums where the hardware offers a choice.
      link_bandwidth: bytes/s to the other devices, each way, counted as a ring uses it; None where there are none.
      start_latency: seconds of a collective that do not depend on its size.
      step_latency: seconds of each step of a ring, of which an all-reduce over n devices has 2 (n - 1).
      sources: where the figures come from.
    """

    name: str
    memory: int
    bandwidth: int | float
    peaks: Mapping[str, int | float] = dataclasses.field(hash=False)
    link_bandwidth: int | float | None = None
    start_latency: float = 0.0
    step_latency: float = 0.0
    sources: tuple[str, ...] = ()

    def __post_init__(self):
        rates = {"memory": self.memory, "bandwidth": self.bandwidth, "link_bandwidth": self.link_bandwidth}
        for name, value in (rates | {f"peaks[{dtype!r}]": rate for dtype, rate in self.peaks.items()}).items():
            if value is not None and not value > 0:
                raise ValueError(f"{self.name}: {name} is {value}; it must be positive")

    def peak(self, dtype: str) -> int | float:
        """FLOP/s of matrix products of a dtype.

        "float32" is "tf32" where the hardware has it, since JAX multiplies float32 so unless it is told otherwise.

        Raises:
          ValueError: no figure for this dtype.
        """
        rate = self.peaks.get("tf32" if dtype == "float32" and "tf32" in self.peaks else dtype)
        if rate is None:
            raise ValueError(
                f"{self.name} has no peak for dtype {dtype!r}; it has {', '.join(self.peaks)}: take one of them"
            )
        return rate

    def ridge(self, dtype: str) -> float:
        """FLOP a byte at which arithmetic takes as long as memory (Williams, Waterman and Patterson 2009)."""
        return self.peak(dtype) / self.bandwidth

    def roof(self, dtype: str) -> str:
        """The ridge and what it is made of, for people: "295 FLOP/byte (989 TFLOP/s in bfloat16, 3.35 TB/s)"."""
        peak, bandwidth = _rate(self.peak(dtype), "FLOP/s"), _rate(self.bandwidth, "B/s")
        return f"{self.ridge(dtype):,.3g} FLOP/byte ({peak} in {dtype}, {bandwidth})"

    def all_reduce_seconds(self, devices: int, bytes: int | float, count: int = 1) -> float:
        """Seconds of `count` all-reduces over a ring of devices.

        Each device sends 2 (n - 1) / n of the bytes, in 2 (n - 1) steps (Patarasuk and Yuan 2009).

        Args:
          devices: n.
          bytes: operands of all of them together, on one device.
          count: how many all-reduces share these bytes.

        Raises:
          ValueError: more than one device, and no link between them.
        """
        if devices == 1:
            return 0.0
        if self.link_bandwidth is None:
            raise ValueError(
                f"{self.name} has no link to other devices and {devices} were asked for; take 1, or give link_bandwidth"
            )
        steps = 2 * (devices - 1)
        return steps / devices * bytes / self.link_bandwidth + count * (self.start_latency + steps * self.step_latency)


def find_hardware(name: str) -> Hardware:
    """The row of the table with a name.

    Raises:
      ValueError: there is none; the message lists those that there are.
    """
    if not isinstance(name, str) or name not in HARDWARE:
        raise ValueError(f"hardware {name!r} is not known; known: {', '.join(HARDWARE)}")
    return HARDWARE[name]


def _rate(value: int | float, unit: str) -> str:
    return f"{value / 1e12:,.3g} T{unit}" if value >= 1e12 else f"{value / 1e9:.3g} G{unit}"


def _tera(**rates: int | float) -> dict[str, float]:
    return {dtype: rate * 1e12 for dtype, rate in rates.items()}


_A100 = _tera(float32=19.5, tf32=156, bfloat16=312, float16=312, int8=624)
_HOPPER = _tera(float32=67, tf32=494.7, bfloat16=989.4, float16=989.4, fp8=1978.9, int8=1978.9)
_NVLINK = {"start_latency": 6.6e-6, "step_latency": 0.6e-6}
_PCIE = {"start_latency": 6.6e-6, "step_latency": 1.0e-6}

HARDWARE: dict[str, Hardware] = {
    "a100-40gb": Hardware(
        name="NVIDIA A100 SXM 40 GB",
        memory=42_331_013_120,
        bandwidth=1.555e12,
        peaks=_A100,
        link_bandwidth=300e9,
        **_NVLINK,
        sources=("NVIDIA A100 Tensor Core GPU data sheet", "NVIDIA A100 architecture white paper, 2020"),
    ),
    "a100-80gb": Hardware(
        name="NVIDIA A100 SXM 80 GB",
        memory=85_100_068_864,
        bandwidth=2.039e12,
        peaks=_A100,
        link_bandwidth=300e9,
        **_NVLINK,
        sources=("NVIDIA A100 80GB data sheet", "NVIDIA A100 architecture white paper, 2020"),
    ),
    "h100-pcie": Hardware(
        name="NVIDIA H100 PCIe",
        memory=84_942_979_072,
        bandwidth=2.039e12,
        peaks=_tera(float32=51.2, tf32=378, bfloat16=756, float16=756, fp8=1513, int8=1513),
        link_bandwidth=64e9,
        **_PCIE,
        sources=(
            "NVIDIA H100 architecture white paper, 2022",
            "links: PCIe Gen5 x16; NVLink bridges join pairs of cards only and are not counted",
        ),
    ),
    "h100": Hardware(
        name="NVIDIA H100 SXM",
        memory=84_942_979_072,
        bandwidth=3.35e12,
        peaks=_HOPPER,
        link_bandwidth=450e9,
        **_NVLINK,
        sources=("NVIDIA H100 data sheet (bandwidth)", "NVIDIA H100 architecture white paper, 2022 (peaks, NVLink 4)"),
    ),
    "h200": Hardware(
        name="NVIDIA H200 SXM",
        memory=151_397_597_184,
        bandwidth=4.8e12,
        peaks=_HOPPER,
        link_bandwidth=450e9,
        **_NVLINK,
        sources=("NVIDIA H200 data sheet", "NVIDIA H100 architecture white paper, 2022 (the same processor)"),
    ),
    "b200": Hardware(
        name="NVIDIA B200 SXM",
        memory=191_514_411_008,
        bandwidth=8e12,
        peaks=_tera(float32=80, tf32=1100, bfloat16=2250, float16=2250, fp8=4500, int8=4500),
        link_bandwidth=900e9,
        **_NVLINK,
        sources=(
            "NVIDIA Blackwell architecture technical brief, 2024 (HGX B200, 1,000 W)",
            "NVIDIA DGX B200 data sheet",
        ),
    ),
    "l40s": Hardware(
        name="NVIDIA L40S",
        memory=48_000_000_000,
        bandwidth=864e9,
        peaks=_tera(float32=91.6, tf32=183, bfloat16=362.05, float16=362.05, fp8=733, int8=733),
        link_bandwidth=32e9,
        **_PCIE,
        sources=("NVIDIA L40S data sheet", "links: PCIe Gen4 x16"),
    ),
    "rtx-4090": Hardware(
        name="NVIDIA GeForce RTX 4090",
        memory=24_000_000_000,
        bandwidth=1.008e12,
        peaks=_tera(float32=82.6, tf32=82.6, bfloat16=165.2, float16=165.2, fp8=330.3, int8=660.6),
        link_bandwidth=32e9,
        **_PCIE,
        sources=("NVIDIA Ada GPU architecture white paper, 2022", "links: PCIe Gen4 x16"),
    ),
}
"""Devices by name; "h100" is the SXM form, as are all whose name says nothing else."""
