"""The worked examples of the literature, computed twice: from their round figures, and from the models themselves.

The round figures (8 B parameters, 2 TB/s) give the texts' numbers to their own precision. The models' own counts leave
the embedding out, of which a step reads a row, hence 10 % for an 8 B and 2 % for a 70 B.
"""

import pytest

from ridgeline.model.presets import preset
from ridgeline.roofline import HARDWARE, Counts, Deployment, Hardware, Part, predict, predict_decode, predict_generation

A100 = Hardware("an A100, rounded", memory=80_000_000_000, bandwidth=2e12, peaks={"float16": 312e12})
H100 = HARDWARE["h100"]


def weights_only(parameters):
    """A decode step of one row, float16, weights alone."""
    return Counts(weights=Part(flops=2 * int(parameters), bytes=2 * int(parameters)), tokens=1)


def model(name, **formats):
    return Deployment(preset(name).replace(dtype="float16"), **formats)


def test_8b_on_an_a100_takes_8_ms_a_token():
    step = predict(weights_only(8e9), A100, "float16")
    assert step.counts.bytes == 16e9
    assert step.seconds == pytest.approx(8e-3)
    assert 1 / step.seconds == pytest.approx(125)
    assert 100 * step.counts.bytes == pytest.approx(1.6e12)
    assert step.bound == "bandwidth"
    exact = predict_decode(model("llama-3.1-8b"), A100, batch=1, context=1)
    assert exact.seconds == pytest.approx(8e-3, rel=0.1)


def test_8b_on_an_a100_uses_064_percent_of_the_arithmetic():
    """One text says 16 GFLOP/s and 0.005 %, which takes the FLOP of a token for those of a second."""
    step = predict(weights_only(8e9), A100, "float16")
    assert step.counts.flops == 16e9
    assert step.counts.flops / step.seconds == pytest.approx(2e12)
    assert step.mfu == pytest.approx(0.0064, rel=0.01)
    assert 16e9 / 312e12 == pytest.approx(0.00005, rel=0.03)  # the mistaken figure: no rate at all
    exact = predict_decode(model("llama-3.1-8b"), A100, batch=1, context=1)
    assert exact.mfu == pytest.approx(0.0064, rel=0.01)


def test_the_ridges():
    assert A100.ridge("float16") == pytest.approx(156)
    assert H100.ridge("float16") == pytest.approx(295, rel=0.002)


def test_70b_on_an_h100_takes_42_ms_a_token():
    step = predict(weights_only(70e9), H100, "float16")
    assert step.counts.bytes == 140e9
    assert step.seconds == pytest.approx(42e-3, rel=0.006)
    assert 1 / step.seconds == pytest.approx(24, rel=0.006)
    assert step.counts.flops == 140e9
    exact = predict_decode(model("llama-3.1-70b"), H100, batch=1, context=1)
    assert exact.seconds == pytest.approx(42e-3, rel=0.02)
    assert exact.counts.flops == pytest.approx(140e9, rel=0.02)
    assert model("llama-3.1-70b").parameter_bytes == pytest.approx(140e9, rel=0.01)


def test_70b_needs_028_ms_of_arithmetic_at_500_tflops():
    at_half = Hardware("an H100 at 500 TFLOP/s", H100.memory, H100.bandwidth, {"float16": 500e12})
    assert predict(weights_only(70e9), at_half, "float16").compute_seconds == pytest.approx(0.28e-3)
    exact = predict_decode(model("llama-3.1-70b"), at_half, batch=1, context=1)
    assert exact.compute_seconds == pytest.approx(0.28e-3, rel=0.02)


def test_kv_of_llama_3():
    assert model("llama-3.1-70b").kv_bytes_per_token == 320 * 1024
    assert model("llama-3.1-8b").cache_bytes(1, 4096) == 512 * 1024**2


def test_most_of_a_request_is_decode():
    run = predict_generation(model("llama-3.1-8b"), A100, batch=1, prompt=1000, new_tokens=100)
    assert run.decode_fraction == pytest.approx(0.94, abs=0.01)
    assert run.prefill.bound == "compute"
    assert run.decode.bound == "bandwidth"


def test_batch_32_costs_almost_what_batch_1_does():
    one, many = (predict_decode(model("llama-3.1-8b"), A100, batch=batch, context=128) for batch in (1, 32))
    assert one.seconds < many.seconds < 1.05 * one.seconds
    assert many.bound == "bandwidth"


def test_batching_pays_until_the_ridge():
    """Without a cache the intensity of a step is its batch: 2 FLOP a weight and row, 2 bytes a weight."""
    for batch in (64, 128, 312):
        step = Counts(weights=Part(flops=batch * 16 * 10**9, bytes=16 * 10**9), tokens=batch)
        phase = predict(step, A100, "float16")
        assert phase.intensity == batch
        assert phase.bound == ("compute" if batch > A100.ridge("float16") else "bandwidth")
        assert phase.seconds == pytest.approx(8e-3 * max(1, batch / 156))


def test_half_the_bytes_are_half_the_time():
    full, int8, int4 = (
        predict_decode(model("llama-3.1-70b", weights=scheme), H100, batch=1, context=128).seconds
        for scheme in (None, "int8", "int4")
    )
    assert full / int8 == pytest.approx(2, rel=0.03)
    assert full / int4 == pytest.approx(4, rel=0.08)  # scales, and an output matrix that stays as it is
