"""How much host memory loading takes above the file cache: less than twice the largest parameter, on any mesh."""

import os
import subprocess
import sys

import pytest

from checkpoints import LLAMA, random_tensors, save

# Two equal parameters a layer are the largest, so that eight threads left to themselves would hold eight of them.
HF = LLAMA | {
    "vocab_size": 256,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": False,
    "torch_dtype": "float16",
}

# On a CPU parameters lie in host memory too: what counts is memory of the process' own (not of mapped files) beyond
# what it had before and beyond the arrays that are there already.
MEASURE = """
import re, sys, threading, time
import jax, jax.numpy as jnp
import ridgeline as rl
from ridgeline.sharding.mesh import make_mesh

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1)) * 1024

def load(directory):
    mesh = None if sys.argv[2] == "1" else make_mesh(tensor=int(sys.argv[2]))
    return rl.load_model(directory, mesh=mesh, dtype=sys.argv[3])

load(sys.argv[4])  # a tiny one first: threads, compiled programs and buffers that every process has
before, peak, done = own(), 0, False

def watch():
    global peak
    while not done:
        now = own()  # before the arrays are counted, so that one made in between does not count twice
        peak = max(peak, now - before - sum(array.nbytes for array in jax.live_arrays()))
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
model = load(sys.argv[1])
done = True
watcher.join()
leaves = jax.tree.leaves(model.params)
print(peak, max(leaf.nbytes for leaf in leaves), sum(leaf.nbytes for leaf in leaves), own() - before)
"""


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("memory")
    for name, hf in (("large", HF), ("small", HF | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8})):
        (root / name).mkdir()
        save(root / name, hf, random_tensors(hf, "float16"))
    return root


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_peak_host_memory(directories, devices, dtype):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    ran = subprocess.run(
        [
            sys.executable,
            "-c",
            MEASURE,
            directories / "large",
            str(devices),
            dtype,
            directories / "small",
        ],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    peak, largest, total, after = map(int, ran.stdout.split())
    assert total > 10 * largest
    assert 0.9 * total < after < 1.2 * total  # the measure sees the parameters, and they are there once
    assert peak < 2 * largest
    print(
        f"{devices} devices, {dtype}: peak {peak / 1e6:.1f} MB, largest {largest / 1e6:.1f} MB, "
        f"parameters {total / 1e6:.1f} MB, grown {after / 1e6:.1f} MB"
    )
