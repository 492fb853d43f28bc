"""The reference attention ops against a dense softmax in NumPy float64, and who serves an op."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import AxisType

from attention_cases import BF16, F16, F32, FP8, INT8, Case, assert_close, dense
from ridgeline.pallas_kernels import dispatch
from ridgeline.pallas_kernels.attention import (
    attention_weights,
    causal_attention,
    decode_attention,
    prefill_attention,
)

BASE = Case(H=20, S=16, K=2, G=3, dtype=F32, lengths=(0, 1, 100))
CASES = [
    BASE,
    dataclasses.replace(BASE, window=9),
    dataclasses.replace(BASE, soft_cap=2.0, scale=1.5),
    dataclasses.replace(BASE, window=1),
    dataclasses.replace(BASE, window=50, soft_cap=5.0, sinks=True),
    dataclasses.replace(BASE, sinks=True),
    dataclasses.replace(BASE, shared=1, lengths=(30, 100, 17)),
    dataclasses.replace(BASE, kv=INT8, window=30),
    dataclasses.replace(BASE, kv=FP8, sinks=True),
    dataclasses.replace(BASE, dtype=BF16),
    dataclasses.replace(BASE, dtype=F16, kv=INT8),
    dataclasses.replace(BASE, lengths=(900, 300)),
]


def in_row_order(arrays):
    """The same batch with pages of its own for each row, in order."""
    tables = jnp.clip(arrays["block_tables"], 0, arrays["pages"].k.shape[0] - 1)
    pages = jax.tree.map(lambda x: x[tables].reshape(-1, *x.shape[1:]), arrays["pages"])
    return arrays | {"pages": pages, "block_tables": None}


@pytest.mark.parametrize("variant", [{}, {"window": 9}, {"soft_cap": 2.0}, {"window": 50, "soft_cap": 5.0}], ids=str)
@pytest.mark.parametrize("T", [1, 37, 1100])
def test_causal_attention(T, variant):
    case = Case(H=20, S=T, K=2, G=3, T=T, lengths=(T, T), dtype=F32, scale=0.3, **variant)
    arrays = case.arrays(T)
    k, v = (jnp.swapaxes(x[arrays["block_tables"][:, 0]], 1, 2) for x in arrays["pages"][:2])
    out = causal_attention(arrays["q"], k, v, case.options)
    assert_close(out, dense(**arrays, starts=np.zeros(2, int)), F32)


@pytest.mark.parametrize("case", CASES[:6], ids=str)
@pytest.mark.parametrize("T", [7, 40])
def test_attention_weights(case, T):
    case = dataclasses.replace(case, S=40, T=T, lengths=(40, 40))
    arrays = case.arrays(T, garbage=100.0)
    k, v = (jnp.swapaxes(x[arrays["block_tables"][:, 0]], 1, 2) for x in arrays["pages"][:2])
    weights = attention_weights(arrays["q"], k, case.options, sinks=arrays.get("sinks"))
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v)
    assert_close(out, dense(**arrays, starts=np.full(2, 40 - T)), F32)


@pytest.mark.parametrize("in_order", [True, False], ids=["in row order", "shuffled"])
@pytest.mark.parametrize("T", [1, 11])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_prefill_attention(case, T, in_order):
    case = dataclasses.replace(case, T=T)
    arrays = case.arrays(T, garbage=100.0)
    arrays["starts"] = jnp.maximum(arrays["lengths"] - T, 0)
    expected = dense(**arrays)
    if in_order:
        arrays = in_row_order(arrays)
    out = prefill_attention(**arrays)
    padding = arrays["starts"][:, None] + jnp.arange(T) >= arrays["lengths"][:, None]
    assert_close(jnp.where(padding[:, :, None, None, None], 0, out), expected, case.dtype)


@pytest.mark.parametrize("in_order", [True, False], ids=["in row order", "shuffled"])
@pytest.mark.parametrize("T", [None, 1, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_decode_attention(case, T, in_order):
    case = dataclasses.replace(case, T=T or 1)
    arrays = case.arrays(3, garbage=100.0)
    expected = dense(**arrays, starts=np.asarray(case.lengths) - case.T)
    if T is None:  # one token a row needs no axis
        arrays["q"], expected = arrays["q"][:, 0], expected[:, 0]
    if in_order:
        arrays = in_row_order(arrays)
    out = decode_attention(**arrays)
    assert_close(out, expected, case.dtype)
    assert not np.asarray(out, np.float32)[np.asarray(case.lengths) == 0].any()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("kv", [F32, INT8], ids=["float32", "int8"])
def test_a_row_decodes_to_the_same_bits_whatever_the_others_hold(kv, T):
    """Also where the others' blocks fill other steps of the loop than before."""
    case = Case(H=16, K=2, G=3, T=T, dtype=F32, kv=kv, lengths=(1500, 700, 900, 2000), window=1300)
    arrays = case.arrays(7, garbage=0.0)
    decode = jax.jit(lambda lengths: decode_attention(**arrays | {"lengths": lengths}))
    whole = decode(arrays["lengths"])
    for others in (0, 5, 130, 2000):
        for row, length in enumerate(case.lengths):
            lengths = np.full(4, others, np.int32)
            lengths[row] = length
            np.testing.assert_array_equal(decode(jnp.asarray(lengths))[row], whole[row])


def test_shapes_are_checked_wherever_beartype_is_installed():
    pytest.importorskip("beartype")
    case = Case()
    with pytest.raises(jaxtyping.TypeCheckError, match="lengths"):
        decode_attention(**case.arrays(0) | {"lengths": jnp.ones(2, jnp.int32)})


def test_an_unknown_implementation_is_refused():
    arrays = Case().arrays(0)
    with pytest.raises((ValueError, TypeError), match="mosaik"):
        decode_attention(**arrays, implementation="mosaik")


@pytest.mark.parametrize(("kv", "drop"), [(INT8, "k_scales"), (FP8, "v_scales")])
def test_quantized_pages_want_scales(kv, drop):
    arrays = Case(kv=kv).arrays(0)
    arrays["pages"] = arrays["pages"]._replace(**{drop: None})
    with pytest.raises(ValueError, match=drop):
        decode_attention(**arrays)


def test_scales_want_quantized_pages():
    arrays, scales = Case().arrays(0), Case(kv=INT8).arrays(0)["pages"].k_scales
    arrays["pages"] = arrays["pages"]._replace(k_scales=scales)
    with pytest.raises(ValueError, match="k_scales go with int8"):
        decode_attention(**arrays)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"H": 72}, "head_dim is 72"),
        ({"S": 24}, "page_size is 24"),
        ({"G": 17}, "17 queries share a KV head"),
        ({"T": 17}, "17 new tokens a row"),
        ({"dtype": F32}, "queries are float32"),
        ({"kv": F16}, "pages are float16 and queries bfloat16"),
    ],
    ids=str,
)
def test_what_the_decode_kernel_does_not_serve_is_refused(change, reason):
    case = dataclasses.replace(Case(), **change)
    with pytest.raises(NotImplementedError, match=reason):
        decode_attention(**case.arrays(0), implementation="mosaic")


@pytest.fixture
def told(monkeypatch):
    """What `serve` says to a user, on a device of the test's choice."""

    def serve_on(device, case):
        dispatch._say_once.cache_clear()
        monkeypatch.setattr(dispatch, "current_device", lambda: device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                text = jax.jit(lambda: decode_attention(**case.arrays(0))).trace().jaxpr
        return [str(w.message) for w in caught if issubclass(w.category, UserWarning)], "split_kernel" in str(text)

    yield serve_on
    dispatch._say_once.cache_clear()


def test_a_hopper_gpu_gets_the_kernel(told):
    assert told(dispatch.Device("gpu", "NVIDIA H200", 132), Case()) == ([], True)


def test_another_gpu_gets_the_reference_and_one_warning(told):
    (message,), kernel = told(dispatch.Device("gpu", "NVIDIA A100-SXM4-80GB", 108), Case())
    assert "need a Hopper GPU" in message and "A100" in message and not kernel  # noqa: PT018


def test_a_case_that_the_kernel_refuses_gets_the_reference_and_one_warning(told):
    (message,), kernel = told(dispatch.Device("gpu", "NVIDIA H100 80GB HBM3", 132), Case(H=72))
    assert "head_dim is 72" in message and not kernel  # noqa: PT018


@pytest.mark.parametrize("version", [None, 12_060, 12_080, 12_090, 13_000])
def test_a_cuda_that_miscompiles_the_kernels_is_refused_by_its_version(told, monkeypatch, version):
    monkeypatch.setattr(dispatch, "cuda_version", lambda: version)
    messages, kernel = told(dispatch.Device("gpu", "NVIDIA H200", 132), Case())
    if version not in (12_080, 12_090):
        assert (messages, kernel) == ([], True)
        return
    (message,) = messages
    assert f"CUDA is 12.{version // 10 % 10}, whose ptxas" in message and not kernel  # noqa: PT018
    with pytest.raises(NotImplementedError, match="CUDA is 12"):
        decode_attention(**Case().arrays(0), implementation="mosaic")


def test_the_version_of_cuda_is_that_of_the_plugin(plugin):
    assert dispatch.cuda_version() >= 12_000


def test_a_cpu_is_not_warned(told):
    assert told(dispatch.Device("cpu", "cpu", None), Case()) == ([], False)


@pytest.mark.parametrize(
    ("kind", "hopper"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        ("NVIDIA H200", True),
        ("NVIDIA GH200 480GB", True),
        ("NVIDIA H20", True),
        ("NVIDIA A100-SXM4-80GB", False),
        ("NVIDIA B200", False),
        ("NVIDIA L40S", False),
    ],
)
def test_hopper_is_told_by_its_name(kind, hopper):
    assert dispatch.Device("gpu", kind, None).is_hopper == hopper


def test_the_device_is_that_of_the_mesh_in_shard_map():
    mesh = jax.make_mesh((1,), ("tensor",), axis_types=(AxisType.Auto,))
    seen = []

    def local(x):
        seen.append(dispatch.current_device())
        return x

    spec = jax.sharding.PartitionSpec()
    jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))(jnp.zeros(2))
    assert seen[0].platform == "cpu"
