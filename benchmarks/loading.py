"""How fast a checkpoint is loaded, against a raw read of the same files: Ridgeline, safetensors and transformers.

Every contender runs in a process of its own, which has imported what it needs and loaded a tiny checkpoint before; they
take turns. "Warm" finds the files in the page cache, "cold" has asked the system to drop them before every run and is
left out where the system does not. After loading, one byte in 4096 is touched, so that a loader which only maps the
files is not done before the bytes are there; such a loader copies nothing, which its peak of memory shows, and its
weights stay the page cache's.
"""

import argparse
import datetime
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..cli.common import OK, UsageError

CHUNK = 16 * 2**20

TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SIZES = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632}
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


# --- the contenders: each takes a directory, and returns what must stay alive while memory is counted ---


def raw(directory: Path) -> Any:
    """Into one small buffer, again and again: nothing is kept."""
    buffer = memoryview(bytearray(CHUNK))
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def raw_kept(directory: Path) -> Any:
    """Into fresh memory, which the system has to clear page by page: what every loader that copies does at least."""
    import numpy as np

    files = sorted(directory.glob("*.safetensors"))
    contents = [np.empty(file.stat().st_size, np.uint8) for file in files]
    for file, content in zip(files, contents, strict=True):
        with file.open("rb", buffering=0) as stream:
            start = 0
            while read := stream.readinto(memoryview(content)[start : start + CHUNK]):
                start += read
    return contents


def ridgeline(directory: Path) -> Any:
    import ridgeline as rl

    leaves = jax_leaves(rl.load_model(directory))
    touch(memory_of(leaf) for leaf in leaves)
    return leaves


def ridgeline_mesh(directory: Path) -> Any:
    import jax

    import ridgeline as rl

    from ..sharding.mesh import make_mesh

    leaves = jax_leaves(rl.load_model(directory, mesh=make_mesh(tensor=len(jax.devices()))))
    touch(memory_of(shard.data) for leaf in leaves for shard in leaf.addressable_shards)
    return leaves


def safetensors_numpy(directory: Path) -> Any:
    from safetensors.numpy import load_file

    tensors = [tensor for file in sorted(directory.glob("*.safetensors")) for tensor in load_file(file).values()]
    touch(memory_of(tensor) for tensor in tensors)
    return tensors


def safetensors_flax(directory: Path) -> Any:
    import jax
    from safetensors.flax import load_file

    arrays = [array for file in sorted(directory.glob("*.safetensors")) for array in load_file(file).values()]
    jax.block_until_ready(arrays)
    touch(memory_of(array) for array in arrays)
    return arrays


def transformers(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    touch(parameter.detach().view(torch.uint8).numpy() for parameter in model.parameters())
    return model


CONTENDERS: dict[str, tuple[Callable[[Path], Any], int]] = {
    "raw read": (raw, 1),
    "raw read, kept": (raw_kept, 1),
    "ridgeline": (ridgeline, 1),
    "ridgeline, 8 devices": (ridgeline_mesh, 8),
    "ridgeline, converted": (ridgeline, 1),
    "safetensors.numpy": (safetensors_numpy, 1),
    "safetensors.flax": (safetensors_flax, 1),
    "transformers": (transformers, 1),
}
"""Name -> function, and the devices that XLA's CPU backend is to show."""


def jax_leaves(model: Any) -> list[Any]:
    import jax

    return jax.block_until_ready(jax.tree.leaves(model.params))


def memory_of(array: Any) -> Any:
    """An array's bytes, flat and without a copy (XLA:CPU shares its memory with numpy)."""
    import numpy as np

    return np.asarray(array).reshape(-1).view(np.uint8)


def touch(arrays: Any) -> int:
    return sum(int(array.reshape(-1)[::4096].sum()) for array in arrays)


# --- the process of one contender ---


def serve(name: str, directory: Path, tiny: Path) -> None:
    """Answer each line of standard input, "time" or "memory", with a line of JSON."""
    load = CONTENDERS[name][0]
    say = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not be taken for an answer
    load(tiny)
    say.write("{}\n")
    for line in sys.stdin:
        gc.collect()
        answer = timed(load, directory) if line.strip() == "time" else watched(load, directory)
        say.write(json.dumps(answer) + "\n")


def timed(load: Callable[[Path], Any], directory: Path) -> dict[str, float]:
    before, started = storage_bytes(), time.perf_counter()
    loaded = load(directory)
    seconds = time.perf_counter() - started
    del loaded
    return {"seconds": seconds, "from_storage": storage_bytes() - before}


def watched(load: Callable[[Path], Any], directory: Path) -> dict[str, int]:
    """Peak of the process' own memory (mapped files not counted), in all and beyond the arrays that JAX holds."""
    live = sys.modules["jax"].live_arrays if "jax" in sys.modules else list
    before, peaks, done = own_bytes(), [0, 0], threading.Event()
    held = sum(array.nbytes for array in live())

    def watch() -> None:
        while not done.is_set():
            grown = own_bytes() - before
            arrays = sum(array.nbytes for array in live()) - held
            peaks[:] = max(peaks[0], grown), max(peaks[1], grown - arrays)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load(directory)
    done.set()
    watcher.join()
    del loaded
    return {"peak": peaks[0], "peak_beyond_arrays": peaks[1]}


def own_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text()).group(1)) * 1024


def storage_bytes() -> int:
    """Bytes that this process has had fetched from storage."""
    return int(re.search(r"read_bytes: (\d+)", Path("/proc/self/io").read_text()).group(1))


class Contender:
    """The process that runs one contender, on the checkpoint it is to load."""

    def __init__(self, name: str, directory: Path, tiny: Path):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={CONTENDERS[name][1]}"
        self.name, self.directory = name, directory
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ridgeline", "bench", "loading", "--serve", name, str(directory), str(tiny)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._drain, daemon=True).start()
        self.errors: list[str] = []
        self._answer()

    def ask(self, what: str) -> dict[str, Any]:
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _drain(self) -> None:
        for line in self.process.stderr:
            self.errors.append(line)

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait(timeout=60)
            raise RuntimeError(self.errors[-1].strip() if self.errors else f"exit code {self.process.returncode}")
        return json.loads(line)


# --- checkpoints and the page cache ---


def write_checkpoint(directory: Path, gigabytes: float, sizes: dict[str, int] = SIZES) -> None:
    """A random Llama checkpoint in bfloat16 of about so many GB, in files of at most 512 MB."""
    import jax.numpy as jnp
    import numpy as np
    from safetensors.numpy import save_file

    from ..model.hf import config_from_hf, family_of

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        config = config_from_hf(LLAMA | sizes | {"num_hidden_layers": layers})
        return {piece.tensor: piece.shape for pieces in family_of(config).tensors(config).values() for piece in pieces}

    def size(layers: int) -> int:
        return 2 * sum(int(np.prod(shape)) for shape in shapes(layers).values())

    layers = max(1, round((gigabytes * 1e9 - size(1)) / (size(2) - size(1))) + 1)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(LLAMA | sizes | {"num_hidden_layers": layers}))
    noise = np.random.default_rng(0).normal(size=2**20).astype(jnp.bfloat16)
    files: list[dict[str, Any]] = [{}]
    for name, shape in shapes(layers).items():
        tensor = np.resize(noise, shape)
        if sum(other.nbytes for other in files[-1].values()) + tensor.nbytes > 512e6:
            files.append({})
        files[-1][name] = tensor
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    for name, tensors in zip(names, files, strict=True):
        save_file(tensors, directory / name, metadata={"format": "pt"})
    weight_map = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
    index = {"metadata": {"total_size": size(layers)}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def files_of(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def drop_from_cache(directory: Path) -> None:
    for path in files_of(directory):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the benchmark ---


def measure(contenders: list[Contender], size: int, repeats: int, cold: bool) -> dict[str, dict[str, Any]]:
    """GB/s of every contender, in turns; nothing for a cold run that storage did not have to serve."""
    rates: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    for turn in range(repeats):
        for contender in contenders[turn % len(contenders) :] + contenders[: turn % len(contenders)]:
            if cold:
                drop_from_cache(contender.directory)
            else:
                raw(contender.directory)
            answer = contender.ask("time")
            if not cold or answer["from_storage"] > 0.9 * size:
                rates[contender.name].append(size / 1e9 / answer["seconds"])
    return {
        name: {"gb_per_s": statistics.median(found), "runs": [round(rate, 3) for rate in found]}
        for name, found in rates.items()
        if found
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':24}{'warm GB/s':>12}{'of raw':>8}{'cold GB/s':>12}{'of raw':>8}{'peak MB':>10}{'beyond arrays':>15}"]
    for name, found in results.items():
        cells = []
        for kind in ("warm", "cold"):
            reference = results["raw read"].get(kind)
            rate = found.get(kind, {}).get("gb_per_s")
            cells += [
                f"{rate:.2f}" if rate else "-",
                f"{rate / reference['gb_per_s']:.2f}" if rate and reference else "-",
            ]
        memory = found["memory"]
        cells += [f"{memory['peak'] / 1e6:.0f}", f"{memory['peak_beyond_arrays'] / 1e6:.0f}"]
        lines.append(f"{name:24}" + "".join(f"{c:>{w}}" for c, w in zip(cells, (12, 8, 12, 8, 10, 15), strict=True)))
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        type=Path,
        metavar="HF_DIR",
        help="a checkpoint to load (default: a random one is written, and removed at the end)",
    )
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, metavar="G", help="size of that one (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="runs of each contender (default: %(default)s)"
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=list(CONTENDERS),
        metavar="NAME",
        help="run these and the raw reads; repeatable",
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where to store the results (default: results/loading-DATE.json)"
    )
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    if args.serve:
        name, directory, tiny = args.serve
        serve(name, Path(directory), Path(tiny))
        return OK
    if args.repeats < 1:
        raise UsageError(f"--repeats is {args.repeats}; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="ridgeline-loading-") as scratch:
        measure_all(args, Path(scratch))
    return OK


def measure_all(args: argparse.Namespace, scratch: Path) -> None:
    from ..model.checkpoint import Checkpoint
    from ..model.loading import convert_model
    from .environment import RESULTS, hardware, now, store, versions

    directory = args.checkpoint or scratch / "checkpoint"
    if args.checkpoint is None:
        write_checkpoint(directory, args.gigabytes)
    write_checkpoint(scratch / "tiny", 0, TINY)
    raws = ("raw read", "raw read, kept")
    names = [name for name in CONTENDERS if name in raws or not args.only or name in args.only]
    converted, converting = scratch / "converted", None
    if "ridgeline, converted" in names:
        started = time.perf_counter()
        convert_model(directory, converted)
        converting = time.perf_counter() - started

    checkpoint = Checkpoint(directory)
    tensors = checkpoint.tensors.values()
    size = sum(info.stop - info.start for info in tensors)
    contenders, skipped = [], {}
    for name in names:
        try:
            contenders.append(Contender(name, converted if "converted" in name else directory, scratch / "tiny"))
        except RuntimeError as error:
            skipped[name] = str(error)
            print(f"{name} is left out: {error}", file=sys.stderr)
    results: dict[str, dict[str, Any]] = {contender.name: {} for contender in contenders}
    for contender in contenders:  # before any run has left memory behind that the next would take up again
        results[contender.name]["memory"] = contender.ask("memory")
    for kind in ("warm", "cold"):
        for name, found in measure(contenders, size, args.repeats, cold=kind == "cold").items():
            results[name][kind] = found
    for contender in contenders:
        contender.close()

    print(f"{size / 1e9:.2f} GB in {len(checkpoint.files)} files, median of {args.repeats} runs in turns")
    print(table(results))
    report = {
        "benchmark": "loading",
        "date": now(),
        "command": args.command,
        "hardware": hardware(),
        "versions": versions("ridgeline", "jax", "numpy", "safetensors", "orbax-checkpoint", "transformers", "torch"),
        "checkpoint": {
            "bytes": size,
            "files": len(checkpoint.files),
            "tensors": len(tensors),
            "largest_tensor_bytes": max(info.stop - info.start for info in tensors),
            "dtypes": sorted({info.dtype for info in tensors}),
        },
        "conversion_seconds": converting,
        "results": results,
        "left_out": skipped,
    }
    out = args.out or RESULTS / f"loading-{datetime.date.today():%Y-%m-%d}.json"
    store(report, out)
    print(f"stored in {out}")
