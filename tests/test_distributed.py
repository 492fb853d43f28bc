"""Two processes of four devices are one mesh of eight."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from families import write_checkpoint

SCRIPT = pathlib.Path(__file__).parent / "two_processes.py"


def start(directory, sizes, processes, process, port):
    flags = f"--xla_force_host_platform_device_count={8 // processes}"
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), str(directory), json.dumps(sizes), str(processes), str(process), str(port)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def results(directory, sizes, processes):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    running = [start(directory, sizes, processes, process, port) for process in range(processes)]
    found = []
    try:
        for process in running:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err[-4000:]
            found.append(json.loads(next(line for line in out.splitlines() if line.startswith("RESULT"))[7:]))
    finally:
        for process in running:
            process.kill()
    return found


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"), "llama3", 8, 4)


@pytest.mark.parametrize("sizes", [{"tensor": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_two_processes_compute_what_one_does(checkpoint, sizes):
    (alone,) = results(checkpoint, sizes, 1)
    pair = results(checkpoint, sizes, 2)
    for result in pair:
        assert result["tokens"] == alone["tokens"]
        assert result["finite"]
        assert result["bytes"] == alone["bytes"] // 2  # each has its own shards only
