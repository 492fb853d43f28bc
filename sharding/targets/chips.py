"""What XLA's compiler wants to know of a GPU, chip by chip, and the text in which it wants it.

Sources:
  Limits of threads, registers and shared memory: NVIDIA, CUDA C++ Programming Guide, "Compute Capabilities", for 8.0,
  9.0 and 10.0 (of the shared memory of a multiprocessor one KB a block is the system's, hence the per-block figure).
  Multiprocessors, NVLink, L2: NVIDIA's architecture white papers (A100 2020, H100 2022) and data sheets (H200, B200).
  Usable memory, bandwidth, boost clock and the L2 of the B200: what the driver reports on each card, as recorded in
  the device descriptions of the OpenXLA project; data sheets round them (80 GB, 141 GB, 8 TB/s).
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU.

    Attributes:
      name: as the driver reports it.
      compute_capability: major and minor; from 9.0 on with the architecture-specific features ("9.0a").
      multiprocessors: streaming multiprocessors that are enabled.
      fp32_lanes: float32 lanes a multiprocessor.
      clock_ghz: highest boost clock.
      memory: usable bytes.
      bandwidth: of that memory, bytes/s.
      l2_cache: bytes.
      shared_memory: bytes a multiprocessor.
      nvlinks: links to the other GPUs of the host.
    """

    name: str
    compute_capability: tuple[int, int]
    multiprocessors: int
    fp32_lanes: int
    clock_ghz: float
    memory: int
    bandwidth: int
    l2_cache: int
    shared_memory: int
    nvlinks: int

    def target_config(self) -> str:
        """The chip as a `GpuTargetConfigProto` in text form."""
        major, minor = self.compute_capability
        specific = major >= 9
        return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  shared_memory_per_core: {self.shared_memory}
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: {self.shared_memory - 1024}
  core_count: {self.multiprocessors}
  fpus_per_core: {self.fp32_lanes}
  clock_rate_ghz: {self.clock_ghz}
  l2_cache_size: {self.l2_cache}
  memory_bandwidth: {self.bandwidth}
  device_memory_size: {self.memory}
  device_address_bits: 64
  cuda_compute_capability {{
    major: {major}
    minor: {minor}
    feature_extension: {"ACCELERATED_FEATURES" if specific else "NONE"}
  }}
  device_interconnect_info {{ active_links: {self.nvlinks} }}
  ecc_enabled: true
  device_vendor: "NVIDIA Corporation"
  name: "{self.name}"
  platform_version: "Compute Capability {major}.{minor}{"a" if specific else ""}"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{self.name}"
"""


CHIPS = {
    "h200": Chip(
        name="NVIDIA H200",
        compute_capability=(9, 0),
        multiprocessors=132,
        fp32_lanes=128,
        clock_ghz=1.98,
        memory=151_397_597_184,
        bandwidth=4_800_000_000_000,
        l2_cache=50 << 20,
        shared_memory=228 << 10,
        nvlinks=18,
    ),
    "h100": Chip(
        name="NVIDIA H100 80GB HBM3",
        compute_capability=(9, 0),
        multiprocessors=132,
        fp32_lanes=128,
        clock_ghz=1.98,
        memory=84_942_979_072,
        bandwidth=3_352_320_000_000,
        l2_cache=50 << 20,
        shared_memory=228 << 10,
        nvlinks=18,
    ),
    "a100": Chip(
        name="NVIDIA A100-SXM4-80GB",
        compute_capability=(8, 0),
        multiprocessors=108,
        fp32_lanes=64,
        clock_ghz=1.41,
        memory=85_100_068_864,
        bandwidth=2_039_040_000_000,
        l2_cache=40 << 20,
        shared_memory=164 << 10,
        nvlinks=12,
    ),
    "b200": Chip(
        name="NVIDIA B200",
        compute_capability=(10, 0),
        multiprocessors=148,
        fp32_lanes=128,
        clock_ghz=1.965,
        memory=191_514_411_008,
        bandwidth=7_672_320_000_000,
        l2_cache=132_644_864,
        shared_memory=228 << 10,
        nvlinks=18,
    ),
}
"""GPUs that programs can be compiled for; each is the SXM form, eight to a host."""
