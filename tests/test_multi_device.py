"""Runs tests/multi_device in a process of its own, with eight CPU devices."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
FILES = sorted((HERE / "multi_device").glob("test_*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_on_eight_devices(file):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"XLA_FLAGS": flags}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-q", "-p", "no:xdist", "-p", "no:cacheprovider"],
        env=environment, capture_output=True, text=True, timeout=550, cwd=HERE.parent,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
