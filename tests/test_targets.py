"""GPUs that are not there."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ridgeline.sharding import targets
from ridgeline.sharding.hlo import collectives, parse
from ridgeline.sharding.targets import CHIPS, compile_for_target, target_mesh


@pytest.mark.parametrize("target", CHIPS)
def test_a_split_product_compiles_for_every_target(plugin, target):
    mesh = target_mesh(target, tensor=4)
    assert mesh.devices.shape == (1, 1, 4)
    assert {device.device_kind for device in mesh.devices.flat} == {CHIPS[target].name}
    x = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(None, "tensor")))
    w = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
    out = NamedSharding(mesh, PartitionSpec())
    compiled = compile_for_target(jax.jit(jnp.dot, out_shardings=out).lower(x, w))
    (found,) = collectives(parse(compiled.as_text()))
    assert (found.kind, found.count) == ("all-reduce", 1)
    assert compiled.memory_analysis().argument_size_in_bytes == (8 * 128 + 128 * 256) * 2


def test_compiling_leaves_the_settings_of_the_cache_as_they_were():
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    lowered = jax.jit(jnp.sin).lower(jax.ShapeDtypeStruct((3,), jnp.float32))
    assert compile_for_target(lowered)(jnp.zeros(3)).shape == (3,)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == before


@pytest.mark.parametrize("target", CHIPS)
def test_a_block_may_use_all_of_a_multiprocessors_shared_memory_but_a_kilobyte(target):
    text = CHIPS[target].target_config()
    limits = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in text.splitlines() if ": " in line}
    assert int(limits["shared_memory_per_core"]) - int(limits["shared_memory_per_block_optin"]) == 1024
    assert limits["feature_extension"] == ("NONE" if target == "a100" else "ACCELERATED_FEATURES")


def test_unknown_target_is_refused():
    with pytest.raises(ValueError, match="target 'h900' is not known; known: h200, h100, a100, b200"):
        target_mesh("h900")


def test_sizes_are_checked_as_those_of_any_mesh(plugin):
    with pytest.raises(ValueError, match="tensor is 0; it must be at least 1"):
        target_mesh("h200", tensor=0)


def test_without_the_plugin_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(targets.metadata, "entry_points", lambda group: ())
    with pytest.raises(RuntimeError, match=rf"pip install jax-cuda13-plugin=={jax.__version__}"):
        target_mesh("h200", tensor=8)


def test_the_plugin_compiles_and_is_silent_where_there_is_no_driver(plugin):
    code = "import ridgeline as rl, jax; jax.devices(); print(rl.programs.target_mesh('h200', tensor=8).size)"
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK")}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "8\n"
    assert "Traceback" not in run.stderr
