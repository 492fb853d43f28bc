"""What every test file shares: where compiled programs are kept, the check of shapes, and the models."""

import importlib.util
import pathlib
from importlib import metadata

import jax
import pytest
from jax._src import compiler
from jaxtyping import install_import_hook

# Compiled programs outlive the run: the second run of the suite takes a fraction of the first.
jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(__file__).parent.parent / ".cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

# These run in a process of their own: see test_multi_device.py.
collect_ignore = ["multi_device"] if jax.device_count() < 8 else []

# Shapes and dtypes of all calls are checked. A machine with a GPU and no network may lack what it takes.
if importlib.util.find_spec("beartype"):
    install_import_hook("ridgeline", "beartype.beartype")

import ridgeline as rl  # noqa: E402
from ridgeline.pallas_kernels.dispatch import current_device  # noqa: E402
from tiny import tiny_model  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--mutations", type=int, default=300, help="how many the fuzz programs try (default: %(default)s)")
    parser.addoption("--mutation-seed", type=int, default=0, help="which (default: %(default)s)")


def pytest_collection_modifyitems(items):
    """The longest first, lest one worker be left with them when the other is done."""
    items.sort(key=lambda item: item.path.stem not in ("test_multi_device", "test_notebooks"))


COMPILED_FULLY = """
    compile contracts decode_mosaic grouped hlo kernel_programs kernel_resources kv_quantization layers matmul_mosaic
    prefill_decode prefill_mosaic products_cpu ptx quantized_kv quantized_weights request roofline_counts
    roofline_measure sampling_programs targets training
"""
"""Files of tests in which programs are read, or run for long. Elsewhere they are many, and each runs a few times: XLA
leaves out most optimizations there, which is half of the time."""


@pytest.fixture(autouse=True, scope="module")
def optimizations(request):
    name = request.path.stem.removeprefix("test_")
    fully = name in COMPILED_FULLY.split() or name.startswith("benchmarks")
    jax.config.update("jax_disable_most_optimizations", not fully)
    plain, fewer = compiler.get_compile_options, {"xla_cpu_use_fusion_emitters": False}

    def options(*args, env_options_overrides=None, **kwargs):
        return plain(*args, env_options_overrides=(env_options_overrides or {}) | fewer, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        if not fully and jax.__version_info__ < (0, 11):  # these emitters take most of the time that is left
            patch.setattr(compiler, "get_compile_options", options)
        yield


@pytest.fixture
def optimized():
    """For a test whose programs run for long, in a file of others that do not."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def memory_maps():
    """Each compiled program keeps maps of memory, and a process that needs more than Linux allows, 65,530, crashes."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def model() -> rl.Model:
    return tiny_model()


@pytest.fixture(scope="session")
def bundled() -> rl.Model:
    return rl.load_model("bundled", dtype="float32")


@pytest.fixture
def plugin():
    """The compiler for GPUs."""
    if not any(found.name.startswith("xla_cuda") for found in metadata.entry_points(group="jax_plugins")):
        pytest.skip("no CUDA plugin of JAX")


@pytest.fixture
def interpreter():
    """What kernels take as `interpret`: None on a Hopper GPU, elsewhere the interpreter, which watches for races."""
    if current_device().is_hopper:
        yield None
        return
    if jax.__version_info__ < (0, 12):
        pytest.skip(f"Mosaic's interpreter in JAX {jax.__version__} does not take these kernels")
    from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
    from jax.experimental.pallas import mosaic_gpu as plgpu

    yield plgpu.InterpretGPUParams(detect_races=True)
    reset_gpu_interpret_mode_state()  # what an exception leaves would fail every case after it
