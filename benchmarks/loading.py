"""How fast a checkpoint is loaded, against a raw read of the same files: Ridgeline, safetensors and transformers.

Every contender runs in a process of its own, which has imported what it needs and loaded a tiny checkpoint before; they
take turns. "Warm" finds the files in the page cache, "cold" has asked the system to drop them before every run and is
left out where the system does not. After loading, one byte in 4096 is touched, so that a loader which only maps the
files is not done before the bytes are there; such a loader copies nothing, which its peak of memory shows, and its
weights stay the page cache's.
"""

import argparse
import gc
import json
import math
import os
import re
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..cli.common import UsageError
from ..model.checkpoint import Checkpoint
from ..model.hf import config_from_hf, family_of
from ..model.loading import convert_model, load_model
from ..model.presets import PRESETS
from ..sharding.mesh import make_mesh
from .harness import Table
from .limits import Figure
from .timing import Turn, elapsed, in_turns
from .worker import Worker

CHUNK = 16 * 2**20
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128}
SIZES = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": False}


# --- the contenders: each takes a directory, and returns what must stay alive while memory is counted ---


def raw(directory: Path) -> None:
    """Into one small buffer, again and again: nothing is kept."""
    buffer = memoryview(bytearray(CHUNK))
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def raw_kept(directory: Path) -> Any:
    """Into fresh memory, which the system has to clear page by page: what every loader that copies does at least."""
    files = sorted(directory.glob("*.safetensors"))
    contents = [np.empty(file.stat().st_size, np.uint8) for file in files]
    for file, content in zip(files, contents, strict=True):
        with file.open("rb", buffering=0) as stream:
            start = 0
            while read := stream.readinto(memoryview(content)[start : start + CHUNK]):
                start += read
    return contents


def ridgeline(directory: Path) -> Any:
    """Over all devices that there are."""
    count = jax.device_count()
    model = load_model(directory, mesh=None if count == 1 else make_mesh(tensor=count))
    leaves = jax.block_until_ready(jax.tree.leaves(model.params))
    return touched([shard.data for leaf in leaves for shard in leaf.addressable_shards])


def safetensors_numpy(directory: Path) -> Any:
    from safetensors.numpy import load_file

    return touched([tensor for file in sorted(directory.glob("*.safetensors")) for tensor in load_file(file).values()])


def safetensors_flax(directory: Path) -> Any:
    from safetensors.flax import load_file

    arrays = [array for file in sorted(directory.glob("*.safetensors")) for array in load_file(file).values()]
    return touched(jax.block_until_ready(arrays))


def transformers(directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    touched([parameter.detach().view(torch.uint8).numpy() for parameter in model.parameters()])
    return model


CONTENDERS: dict[str, tuple[Callable[[Path], Any], int]] = {
    "raw read": (raw, 1),
    "raw read, kept": (raw_kept, 1),
    "ridgeline": (ridgeline, 1),
    "ridgeline, 8 devices": (ridgeline, 8),
    "ridgeline, converted": (ridgeline, 1),
    "safetensors.numpy": (safetensors_numpy, 1),
    "safetensors.flax": (safetensors_flax, 1),
    "transformers": (transformers, 1),
}
"""Name -> function, and the devices that XLA's CPU backend is to show."""


def touched(arrays: list[Any]) -> list[Any]:
    """The arrays, one byte in 4096 of each read (XLA:CPU shares its memory with numpy)."""
    for array in arrays:
        np.asarray(array).reshape(-1).view(np.uint8)[::4096].sum()
    return arrays


# --- what a contender's process does ---


def contender(name: str, directory: Path, tiny: Path) -> Callable[[str], dict[str, int | float]]:
    """Answers "time" or "memory" with that of one more load of a directory."""
    load = CONTENDERS[name][0]
    load(tiny)

    def answer(what: str) -> dict[str, int | float]:
        gc.collect()
        return timed(load, directory) if what == "time" else watched(load, directory)

    return answer


def timed(load: Callable[[Path], Any], directory: Path) -> dict[str, int | float]:
    before = counted("read_bytes")
    seconds, _ = elapsed(lambda: load(directory))
    return {"seconds": seconds, "from_storage": counted("read_bytes") - before}


def watched(load: Callable[[Path], Any], directory: Path) -> dict[str, int]:
    """Peak of the process' own memory (mapped files not counted), in all and beyond the arrays that JAX holds."""
    peaks, done = [0, 0], threading.Event()

    def sizes() -> tuple[int, int]:
        return counted("RssAnon") * 1024, sum(array.nbytes for array in jax.live_arrays())

    own, arrays = sizes()

    def watch() -> None:
        while not done.wait(0.001):
            grown, held = sizes()
            peaks[:] = max(peaks[0], grown - own), max(peaks[1], grown - own - (held - arrays))

    watcher = threading.Thread(target=watch)
    watcher.start()
    loaded = load(directory)
    done.set()
    watcher.join()
    del loaded
    return {"peak": peaks[0], "peak_beyond_arrays": peaks[1]}


def counted(what: str) -> int:
    """Of this process: "RssAnon", KiB of its own memory; "read_bytes", bytes that it has had fetched from storage."""
    texts = (Path("/proc/self", name).read_text() for name in ("status", "io"))
    return int(re.search(rf"^{what}:\s+(\d+)", "\n".join(texts), re.MULTILINE).group(1))


# --- checkpoints and the page cache ---


def write_checkpoint(directory: Path, gigabytes: int | float, sizes: Mapping[str, int]) -> None:
    """A random Llama checkpoint in bfloat16 of about so many GB, one layer at least, in files of at most 512 MB."""
    from safetensors.numpy import save_file

    def hf(layers: int) -> dict[str, Any]:
        return PRESETS["llama-2-7b"] | HEADS | sizes | {"num_hidden_layers": layers}

    def shapes(layers: int) -> dict[str, tuple[int, ...]]:
        config = config_from_hf(hf(layers))
        return {piece.tensor: piece.shape for pieces in family_of(config).tensors(config).values() for piece in pieces}

    one, two = (2 * sum(map(math.prod, shapes(layers).values())) for layers in (1, 2))
    layers = max(1, round((gigabytes * 1e9 - one) / (two - one)) + 1)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf(layers)))
    noise = np.random.default_rng(0).normal(size=2**20).astype(jnp.bfloat16)
    files: list[dict[str, Any]] = [{}]
    for name, shape in shapes(layers).items():
        if sum(tensor.nbytes for tensor in files[-1].values()) + 2 * math.prod(shape) > 512e6:
            files.append({})
        files[-1][name] = np.resize(noise, shape)
    weight_map = {}
    for index, tensors in enumerate(files):
        save_file(tensors, directory / f"model-{index:05}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{index:05}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def drop_from_cache(directory: Path) -> None:
    for path in filter(Path.is_file, directory.rglob("*")):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# --- the benchmark ---


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    help = "a checkpoint to load (default: a random one is written, and removed at the end)"
    add("checkpoint", nargs="?", type=Path, metavar="HF_DIR", help=help)
    add("--gigabytes", type=float, default=1.0, metavar="G", help="size of that one (default: %(default)s)")
    add("--repeats", type=int, default=5, metavar="N", help="runs of each contender (default: %(default)s)")
    help = f"run these and the raw read, of {', '.join(CONTENDERS)}; repeatable"
    add("--only", action="append", choices=list(CONTENDERS), metavar="NAME", help=help)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    if args.repeats < 1:
        raise UsageError(f"--repeats is {args.repeats}; it must be at least 1")
    with tempfile.TemporaryDirectory(prefix="ridgeline-loading-") as scratch:
        yield measured(args, Path(scratch))


def load_turn(worker: Worker, directory: Path, size: int, cold: bool) -> Turn:
    """Seconds of loading so many bytes; nothing for a cold run that storage did not have to serve."""

    def turn() -> Mapping[str, float]:
        drop_from_cache(directory) if cold else raw(directory)
        answer = worker.ask("time")
        return {"load": answer["seconds"]} if not cold or answer["from_storage"] > 0.9 * size else {}

    return turn


def measured(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    directory, converted, tiny = args.checkpoint or scratch / "checkpoint", scratch / "converted", scratch / "tiny"
    if args.checkpoint is None:
        write_checkpoint(directory, args.gigabytes, SIZES if args.gigabytes else TINY)
    write_checkpoint(tiny, 0, TINY)
    names = [name for name in CONTENDERS if not args.only or name in ("raw read", *args.only)]
    directories = {name: converted if "converted" in name else directory for name in names}
    converting = elapsed(lambda: convert_model(directory, converted))[0] if converted in directories.values() else None
    checkpoint = Checkpoint(directory)
    size = sum(info.stop - info.start for info in checkpoint.tensors.values())
    workers, left_out = {}, {}
    for name in names:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={CONTENDERS[name][1]}"
        environment = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
        try:
            workers[name] = Worker(contender, name, directories[name], tiny, environment=environment)
        except RuntimeError as error:
            left_out[name] = str(error)
    # Memory before any run has left some behind that the next would take up again.
    results = {name: {"memory": worker.ask("memory")} for name, worker in workers.items()}
    for kind in ("warm", "cold"):
        turns = {name: load_turn(workers[name], directories[name], size, kind == "cold") for name in workers}
        for name, timings in in_turns(turns, args.repeats, turns)[0].items():
            if timings:
                rates = [size / 1e9 / seconds for seconds in timings["load"].runs]
                results[name][kind] = {"gb_per_s": statistics.median(rates), "runs": rates}
    for worker in workers.values():
        worker.close()
    return {
        "checkpoint": {"bytes": size, "files": len(checkpoint.files), "tensors": len(checkpoint.tensors)},
        "conversion_seconds": converting,
        "repeats": args.repeats,
        "results": results,
        "left_out": left_out,
    }


def show(report: Mapping[str, Any]) -> Iterator[Table | str]:
    rows, raw_read = [], report["results"]["raw read"]
    for name, result in report["results"].items():
        cells = []
        for kind in ("warm", "cold"):
            rate, limit = (each.get(kind, {}).get("gb_per_s") for each in (result, raw_read))
            cells += ["-" if rate is None else f"{rate:.2f}", f"{rate / limit:.2f}" if rate and limit else "-"]
        memory = result["memory"]
        rows.append((name, *cells, *(f"{memory[key] / 1e6:.0f}" for key in ("peak", "peak_beyond_arrays"))))
    columns = ("", "warm GB/s", "of raw", "cold GB/s", "of raw", "peak MB", "beyond arrays")
    size, files = report["checkpoint"]["bytes"] / 1e9, report["checkpoint"]["files"]
    yield Table(f"{size:.2f} GB in {files} files, median of {report['repeats']} runs in turns", columns, rows)
    yield from (f"{name} is left out: {why}" for name, why in report["left_out"].items())


def figures(report: Mapping[str, Any]) -> Iterator[Figure]:
    """Each loader beside the raw read."""
    for kind in ("warm", "cold"):
        for name, result in report["results"].items():
            if kind in result and name != "raw read" and kind in report["results"]["raw read"]:
                limit = report["results"]["raw read"][kind]["gb_per_s"]
                yield Figure(f"{name}, {kind}", result[kind]["gb_per_s"], limit, "GB/s", rate=True)
