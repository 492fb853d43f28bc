"""What JAX's CUDA plugin prints of each Mosaic GPU kernel that it compiles: PTX, ptxas' report, its launch.

It prints on standard output, from C++, and only when a process compiles a kernel for the first time.
"""

import contextlib
import ctypes
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

ASK = {f"MOSAIC_GPU_DUMP_{what}": "1" for what in ("PTX", "PTXAS", "HOST_LLVM")}
"""Settings that make the plugin print; it looks at them when a process first compiles a kernel."""


@contextlib.contextmanager
def captured() -> Iterator[list[str]]:
    """Everything written to file descriptor 1 meanwhile, by C++ too: one string, once the block has ended."""
    libc, printed = ctypes.CDLL(None), []
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        libc.fflush(None)
        before = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield printed
        finally:
            sys.stdout.flush()
            libc.fflush(None)
            os.dup2(before, 1)
            os.close(before)
            file.seek(0)
            printed.append(file.read().decode(errors="replace"))


_COMPILED = re.compile(
    r"Compiling entry function '(?P<name>\w+)_mosaic_gpu_kernel'.*?"
    r"(?P<spill_stores>\d+) bytes spill stores, (?P<spill_loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers",
    re.DOTALL,
)
_PTX = re.compile(r"^\.version.*?^\.visible \.entry (?P<name>\w+)_mosaic_gpu_kernel\(.*?^}$", re.DOTALL | re.MULTILINE)
_LAUNCHED = re.compile(
    r"define \w+ @(\w+)_mosaic_gpu\((?:(?!\ndefine ).)*?"
    r"call \w+ @mosaic_gpu_(?:launch_kernel|build_kernel_spec)\(ptr %\w+((?:, i32 \d+){10})",
    re.DOTALL,
)


def kernels_in(printed: str) -> list[dict[str, Any]]:
    """The kernels that ptxas and the host code speak of, in the order in which they were compiled.

    Returns:
      A dictionary a kernel: "kernel" (its name), registers a thread, spill_stores and spill_loads in bytes, threads and
      shared_memory bytes a block, blocks launched, "serialized" (ptxas' lines that say wgmma is), and "ptx".

    Raises:
      RuntimeError: the PTX or the launch of a kernel was not found.
    """
    ptx = {match["name"]: match[0] for match in _PTX.finditer(printed)}
    launches = {}
    for name, numbers in _LAUNCHED.findall(printed):
        # Three numbers each of the grid, the cluster and the block, then bytes of shared memory.
        n = [int(number) for number in re.findall(r"i32 (\d+)", numbers)]
        launches[name] = {
            "threads": n[6] * n[7] * n[8],
            "shared_memory": n[9],
            "blocks": n[0] * n[1] * n[2],
        }
    kernels = []
    for match in _COMPILED.finditer(printed):
        fields = match.groupdict()
        name = fields.pop("name")
        for what, read in (("launch was found in the host code", launches), ("PTX was found", ptx)):
            if name not in read:
                raise RuntimeError(f"{name}: no {what}, which this JAX prints in another form")
        numbers = {key: int(value) for key, value in fields.items()}
        warnings = re.findall(rf"^ptxas.*: (.*serialized.*'{name}_mosaic_gpu_kernel'.*)", printed, re.MULTILINE)
        kernels.append({"kernel": name, **numbers, **launches[name], "serialized": warnings, "ptx": ptx[name]})
    return kernels
