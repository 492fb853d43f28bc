"""What every test file shares: where compiled programs are kept, and the models."""

import pathlib

import jax
import pytest

# Compiled programs outlive the run: the second run of the suite takes a fraction of the first.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# These run in a process of their own: see test_multi_device.py.
collect_ignore = ["multi_device"] if jax.device_count() < 8 else []

import ridgeline as rl  # noqa: E402
from tiny import tiny_model  # noqa: E402


@pytest.fixture(scope="session")
def model() -> rl.Model:
    return tiny_model()


@pytest.fixture(scope="session")
def bundled() -> rl.Model:
    return rl.load_model("bundled", dtype="float32")


@pytest.fixture
def interpreter():
    """Parameters of Mosaic's interpreter, which also watches for races."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    if not hasattr(plgpu, "InterpretGPUParams"):
        pytest.skip(f"Mosaic's interpreter in JAX {jax.__version__} lacks transposed references")
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state

    yield plgpu.InterpretGPUParams(detect_races=True)
    reset_gpu_interpret_mode_state()  # what an exception leaves would fail every case after it
