"""The kernels, compiled for an H200 that is not there: no spills, and blocks that fit."""

import json
import subprocess
import sys

import ptx
import pytest

from ridgeline.benchmarks import kernel_resources as program
from ridgeline.benchmarks import mosaic_dump
from ridgeline.sharding.targets import CHIPS


def test_the_kernels_fit_an_h200_and_are_without_hazards(plugin, tmp_path):
    out = tmp_path / "resources.json"
    command = [sys.executable, "-m", "ridgeline", "bench", "resources"]  # a process reports a kernel once
    arguments = ["--quick", "--output", out, "--ptx", tmp_path]
    run = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    report = json.loads(out.read_text())
    assert [result["case"] for result in report["results"]] == list(map(program.name_of, program.QUICK))
    for result in report["results"]:
        assert "error" not in result
        kernels = result["kernels"]
        assert len(kernels) == (2 if result["op"] == "decode" else 1)
        for kernel in kernels:
            assert (kernel["spill_stores"], kernel["spill_loads"]) == (0, 0)
            assert kernel["serialized"] == []
            assert 0 < kernel["registers"] <= 255
            assert 0 < kernel["shared_memory"] <= 232448
            assert kernel["blocks_per_sm"] >= 1
        if result["op"] == "decode":
            assert [kernel["waves"] for kernel in kernels if kernel["waves"]] == [1.0]
        if result["op"] == "matmul":  # equal shares: nearly as many blocks as multiprocessors
            assert 0.9 <= kernels[0]["waves"] <= 1.0
    programs = {path.name: path.read_text() for path in tmp_path.glob("*.ptx")}
    assert len(programs) == sum(len(result["kernels"]) for result in report["results"])
    assert {name: hazards for name, text in programs.items() if (hazards := ptx.hazards(text))} == {}


PTX = """\
.version 9.0
.visible .entry one_mosaic_gpu_kernel(
)
{
	ret;
}"""
SERIALIZED = "(C7513) wgmma.mma_async instructions are serialized in the function 'one_mosaic_gpu_kernel'"
PRINTED = f"""\
{PTX}

ptxas info    : {SERIALIZED}
ptxas info    : Compiling entry function 'one_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for one_mosaic_gpu_kernel
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem

define TYPE @one_mosaic_gpu(ptr %0, ptr %1) {{
  call TYPE @CALL(ptr %0, i32 6, i32 2, i32 1, i32 0, i32 0, i32 0, i32 128, i32 3, i32 1, i32 1000, i32 0)
}}
"""


@pytest.mark.parametrize(
    ("kind", "call"),
    [
        ("void", "mosaic_gpu_launch_kernel"),
        ("i32", "mosaic_gpu_launch_kernel"),
        ("void", "mosaic_gpu_build_kernel_spec"),
    ],
    ids=["0.10", "0.11", "0.12"],
)
def test_reports_of_compiler_and_host_code_are_read(kind, call):
    (kernel,) = mosaic_dump.kernels_in(PRINTED.replace("TYPE", kind).replace("CALL", call))
    assert kernel == {
        "kernel": "one",
        "registers": 168,
        "spill_stores": 4,
        "spill_loads": 12,
        "serialized": [SERIALIZED],
        "ptx": PTX,
        "threads": 384,
        "shared_memory": 1000,
        "blocks": 12,
    }


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "held"),
    [
        (128, 128, 2048, 4),  # 4 x 128 x 128 registers are all there are
        (128, 129, 2048, 3),
        (384, 168, 2048, 1),
        (128, 32, 76800, 3),  # 3 x (75 KB + 1 KB) are all of the 228
        (128, 32, 76801, 2),
        (1024, 16, 0, 2),
        (32, 16, 0, 32),
    ],
)
def test_blocks_a_multiprocessor(threads, registers, shared, held):
    kernel = {"kernel": program.FILLS[0], "threads": threads, "registers": registers, "shared_memory": shared}
    found = program.occupancy(kernel | {"blocks": 3 * held * 132}, CHIPS["h200"])
    assert found == {"blocks_per_sm": held, "waves": 3.0}


def test_what_does_not_fit_is_a_fault():
    good = {"kernel": "one", "registers": 100, "spill_stores": 0, "spill_loads": 0, "shared_memory": 232448}
    good |= {"serialized": [], "blocks_per_sm": 1, "waves": 1.0}

    def faults(**changes):
        return program.faults({"case": "c", "kernels": [good | changes]}, CHIPS["h200"])

    assert faults() == []
    assert faults(spill_stores=4) == ["c, one: spills, 4 bytes stored and 0 loaded"]
    assert faults(serialized=[SERIALIZED]) == [f"c, one: {SERIALIZED}"]
    assert faults(shared_memory=232449) == ["c, one: 232449 bytes of shared memory a block; NVIDIA H200 has 232448"]
    assert faults(waves=1.5) == [
        "c, one: 1.5 waves, where one was meant; 1 blocks of 232448 bytes fit a multiprocessor"
    ]
    assert program.faults({"case": "c", "error": "E: no"}, CHIPS["h200"]) == ["c: E: no"]


@pytest.mark.parametrize(("known", "message"), [("@CALL", "no launch was found"), (".entry", "no PTX was found")])
def test_what_is_printed_in_another_form_is_an_error(known, message):
    printed = PRINTED.replace(known, "other").replace("CALL", "mosaic_gpu_launch_kernel")
    with pytest.raises(RuntimeError, match=f"one: {message}"):
        mosaic_dump.kernels_in(printed)
