"""The reader of PTX finds the faults that were planted in kernels, compiled for an H200 that is not there."""

import os
import subprocess
import sys
from pathlib import Path

import ptx

from ridgeline.benchmarks.mosaic_dump import ASK, kernels_in

TESTS = Path(__file__).parent
KINDS = {
    "accumulator": "accumulators of a wgmma in flight",
    "operand": "operand of a wgmma in flight",
    "slot": "no proxy fence between ordinary accesses and cp.async.bulk",
    "slot_of_another": "no proxy fence between ordinary accesses and cp.async.bulk",
}


def test_planted_faults_are_found_and_sound_kernels_are_not_accused(plugin):
    environment = os.environ | ASK | {"JAX_PLATFORMS": "cpu"}
    script = [sys.executable, TESTS / "planted_kernels.py"]
    run = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    hazards = {kernel["kernel"]: ptx.hazards(kernel["ptx"]) for kernel in kernels_in(run.stdout)}
    assert hazards.keys() == {f"{state}_{fault}" for state in ("sound", "faulty") for fault in KINDS}
    for fault, kind in KINDS.items():
        assert hazards[f"sound_{fault}"] == []
        assert hazards[f"faulty_{fault}"]
        assert all(kind in hazard for hazard in hazards[f"faulty_{fault}"])
