"""On a mesh that spans two processes each reads its own shards, from a checkpoint as it came and from a conversion."""

import json
import os
import socket
import subprocess
import sys

import pytest

from checkpoints import LLAMA, random_tensors, save
from ridgeline.model.loading import convert_model

HF = LLAMA | {"vocab_size": 32, "intermediate_size": 32, "num_attention_heads": 16, "num_key_value_heads": 8}

# Prints the elements that were read, and those of the process' shards (replicas counted once).
SCRIPT = """
import json, sys
import jax, numpy as np
import ridgeline as rl
from ridgeline.model.checkpoint import load

directory, original, sizes, process, port = sys.argv[1:]
rl.initialize_distributed(coordinator_address=f"127.0.0.1:{port}", num_processes=2, process_id=int(process))
read, reader = [], load.read_parameter
load.read_parameter = lambda *args: read.append(reader(*args)) or read[-1]
split = rl.load_model(directory, mesh=rl.make_mesh(**json.loads(sizes)))
from_files, held = sum(part.size for part in read), 0
with jax.default_device(jax.local_devices()[0]):
    whole = rl.load_model(original)
assert split.config.num_kv_heads == whole.config.num_kv_heads
for array, expected in zip(jax.tree.leaves(split.params), jax.tree.leaves(whole.params), strict=True):
    assert len(array.addressable_shards) == 4
    for shard in array.addressable_shards:
        np.testing.assert_array_equal(shard.data, np.asarray(expected)[shard.index])
    held += sum({str(shard.index): shard.data.size for shard in array.addressable_shards}.values())
print("RESULT", json.dumps([from_files, held, rl.count_parameters(whole.config)]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    (root / "hf").mkdir()
    save(root / "hf", HF, random_tensors(HF))
    convert_model(root / "hf", root / "converted")
    return root


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("source", ["hf", "converted"])
def test_each_process_reads_its_own_shards(root, source, sizes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, root / source, root / "hf", json.dumps(sizes), str(process), str(port)],
            env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        for process in running:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-4000:]
            line = next(line for line in out.splitlines() if line.startswith("RESULT"))
            read, held, parameters = json.loads(line.removeprefix("RESULT"))
            if source == "hf":
                assert read == held
            if sizes == {"tensor": 8}:
                assert held < 0.6 * parameters  # half of what is split, and the norms
    finally:
        for process in running:
            process.kill()
