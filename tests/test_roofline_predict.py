"""Predictions from counts, and plans over grids of them."""

import dataclasses
import json

import pytest

from ridgeline.model.presets import preset
from ridgeline.roofline import (
    HARDWARE,
    Counts,
    Deployment,
    Hardware,
    Part,
    best_speculation,
    cost_per_million,
    count_decode,
    count_prefill,
    count_step,
    expected_tokens,
    plan,
    predict,
    predict_decode,
    predict_generation,
    predict_prefill,
    predict_speculation,
    remedies,
)

H100 = HARDWARE["h100"]
UNIT = Hardware("unit", 1000, 10.0, {"bfloat16": 100.0}, link_bandwidth=5.0, start_latency=1.0, step_latency=0.25)
CONFIG = preset("llama-3.1-8b")


def step(flops, bytes, collective=0, all_reduces=0):
    return Counts(weights=Part(flops, bytes), collectives=Part(bytes=collective), all_reduces=all_reduces, tokens=1)


def test_a_phase_is_the_longer_of_two_and_its_collectives():
    phase = predict(step(200, 40, collective=15, all_reduces=2), UNIT, "bfloat16", tensor=2)
    assert (phase.compute_seconds, phase.memory_seconds) == (2.0, 4.0)
    assert phase.communication_seconds == 15 / 5 + 2 * (1 + 2 * 0.25)
    assert phase.seconds == 4.0 + 6.0
    assert phase.bound == "communication"
    assert (phase.mfu, phase.mbu) == (0.2, 0.4)
    assert (phase.intensity, phase.ridge) == (5.0, 10.0)


def test_steps_do_not_overlap_each_other():
    phase = predict([step(300, 10), step(100, 40)], UNIT, "bfloat16")
    assert phase.seconds == 3.0 + 4.0
    assert (phase.compute_seconds, phase.memory_seconds, phase.counts.tokens) == (4.0, 5.0, 2)


def test_efficiency_stretches_everything():
    sizes = {"batch": 4, "context": 1000}
    deployment = Deployment(CONFIG, tensor=4)
    ideal, real = (predict_decode(deployment, H100, **sizes, efficiency=e) for e in (1, 0.8))
    assert real.seconds == pytest.approx(ideal.seconds / 0.8)
    assert real.mbu == pytest.approx(0.8 * ideal.mbu)
    assert real.bound == ideal.bound


def test_prefill_is_its_chunks():
    deployment = Deployment(CONFIG)
    phase = predict_prefill(deployment, H100, batch=2, prompt=2500, chunk=1024)
    chunks = [count_prefill(deployment, 2, 1024), count_prefill(deployment, 2, 1024, 1024)]
    chunks.append(count_prefill(deployment, 2, 452, 2048))
    assert phase.counts == chunks[0] + chunks[1] + chunks[2]
    assert phase.seconds == predict(chunks, H100, "bfloat16").seconds
    assert predict_prefill(deployment, H100, batch=2, prompt=2500).seconds < phase.seconds


def test_generation_grows_its_cache():
    deployment = Deployment(CONFIG)
    run = predict_generation(deployment, H100, batch=3, prompt=100, new_tokens=4)
    steps = [count_decode(deployment, 3, context) for context in (101, 102, 103)]
    assert run.decode.seconds == pytest.approx(sum(predict(one, H100, "bfloat16").seconds for one in steps))
    assert run.tpot == pytest.approx(run.decode.seconds / 3)
    assert run.seconds == run.prefill.seconds + run.decode.seconds


def test_expected_tokens_is_leviathans_formula():
    for a in (0.1, 0.5, 0.8):
        for k in (1, 4, 7):
            assert expected_tokens(a, k) == pytest.approx((1 - a ** (k + 1)) / (1 - a))
    assert expected_tokens(0.0, 5) == 1
    assert expected_tokens(1.0, 5) == 6
    assert expected_tokens([0.9, 0.5, 0.0], 3) == pytest.approx(1 + 0.9 + 0.45)


def test_speculation_pays_with_a_good_small_draft_alone():
    target, draft = Deployment(preset("llama-3.1-70b"), tensor=4), Deployment(preset("llama-3.2-1b"))
    sizes = {"batch": 1, "context": 2000, "draft_tokens": 4}
    good = predict_speculation(target, draft, H100, acceptance=0.8, **sizes)
    assert good.tokens == pytest.approx(3.3616)
    assert good.draft_seconds == pytest.approx(4 * predict_decode(draft, H100, batch=1, context=2000).seconds, rel=1e-3)
    verify = count_step(target, 1, tokens=5, cached=1999, scored=5)
    assert good.verify == predict(verify, H100, "bfloat16", tensor=4)
    assert good.verify.seconds < 1.3 * good.plain_seconds  # five tokens read the weights once
    assert good.speedup == pytest.approx(good.plain_seconds * good.tokens / (good.draft_seconds + good.verify.seconds))
    assert good.speedup > 2
    sizes_of = {"batch": 1, "context": 2000, "acceptance": 0.8}
    rounds = [predict_speculation(target, draft, H100, draft_tokens=n, **sizes_of) for n in range(1, 9)]
    best = best_speculation(target, draft, H100, **sizes_of)
    assert best == max(rounds, key=lambda one: one.speedup)
    assert 1 < best.draft_tokens < 8
    assert predict_speculation(target, draft, H100, acceptance=0.0, **sizes).speedup < 1
    assert predict_speculation(target, target, H100, acceptance=0.8, **sizes).speedup < 1
    # A batch at the ridge has no arithmetic to spare.
    assert predict_speculation(target, draft, H100, acceptance=0.8, **(sizes | {"batch": 512})).speedup < good.speedup


def test_cost():
    assert cost_per_million(3.6, 1000) == pytest.approx(1.0)


def test_plan_is_the_grid_in_order():
    rows = plan(CONFIG, H100, tensors=[2, 1], batches=[1, 128], context=8192, prompt=1000, chunk=1024, price=2)
    assert [(row.tensor, row.batch) for row in rows] == [(2, 1), (2, 128), (1, 1), (1, 128)]
    for row in rows:
        deployment = Deployment(CONFIG, tensor=row.tensor)
        used = deployment.parameter_bytes + deployment.cache_bytes(row.batch, 8192)
        assert row.weight_bytes + row.kv_bytes == used
        assert row.free_bytes == int(0.9 * H100.memory - used)
        assert row.fits == (used <= 0.9 * H100.memory) == (row.batch <= row.largest_batch)
        assert row.fits == (row.longest_context >= 8192)
        if not row.fits:
            assert row.ttft is row.tpot is row.tokens_per_second is row.cost_output is None
            continue
        assert row.ttft == predict_prefill(deployment, H100, batch=row.batch, prompt=1000, chunk=1024).seconds
        assert row.tpot == predict_decode(deployment, H100, batch=row.batch, context=8192).seconds
        assert row.cost_output == pytest.approx(2 * row.tensor / 3600 * row.tpot / row.batch * 1e6)
        assert row.cost_input == pytest.approx(2 * row.tensor / 3600 * row.ttft / row.batch / 1000 * 1e6)
    json.dumps([dataclasses.asdict(row) for row in rows])


@pytest.mark.parametrize("batch", [1, 64])
def test_each_remedy_makes_it_fit_and_no_less_does(batch):
    config, sizes = preset("llama-3.1-70b"), {"context": 8192, "prompt": 1}
    row = plan(config, H100, batches=[batch], **sizes)[0]
    found = dict(remedy.split() for remedy in remedies(config, H100, row, context=8192))
    assert set(found) == {1: {"tensor", "weights"}, 64: {"tensor"}}[batch]
    tensor = int(found["tensor"])
    assert plan(config, H100, tensors=[tensor], batches=[batch], **sizes)[0].fits
    assert not plan(config, H100, tensors=[tensor // 2], batches=[batch], **sizes)[0].fits
    if "weights" in found:
        assert plan(config, H100, batches=[batch], weights=found["weights"], **sizes)[0].fits


def test_remedies_of_batch_and_context():
    row = plan(CONFIG, H100, batches=[100], context=8192, prompt=1)[0]
    found = dict(remedy.split() for remedy in remedies(CONFIG, H100, row, context=8192))
    batch, context = (int(found[name].replace(",", "")) for name in ("batch", "context"))
    assert plan(CONFIG, H100, batches=[batch], context=8192, prompt=1)[0].fits
    assert not plan(CONFIG, H100, batches=[batch + 1], context=8192, prompt=1)[0].fits
    assert plan(CONFIG, H100, batches=[100], context=context, prompt=1)[0].fits
    assert not plan(CONFIG, H100, batches=[100], context=context + 1, prompt=1)[0].fits


def test_without_links_more_devices_are_no_remedy():
    alone = dataclasses.replace(H100, link_bandwidth=None)
    row = plan(preset("llama-3.1-70b"), alone, batches=[1], context=8192, prompt=1)[0]
    assert remedies(preset("llama-3.1-70b"), alone, row, context=8192) == ["weights int8"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: predict(step(1, 1), H100, "int4"), "no peak for dtype 'int4'"),
        (lambda: predict(step(1, 1), H100, "bfloat16", efficiency=0), "efficiency is 0; it must be above 0"),
        (lambda: predict_prefill(Deployment(CONFIG), H100, batch=1, prompt=0), "prompt is 0"),
        (lambda: predict_generation(Deployment(CONFIG), H100, batch=1, prompt=5, new_tokens=1), "new_tokens is 1"),
        (lambda: expected_tokens(1.5, 2), "acceptance is 1.5"),
        (lambda: expected_tokens(0.5, 0), "draft_tokens is 0"),
        (lambda: expected_tokens([0.5], 2), r"acceptance is \[0.5\]; .* for each of 2"),
        (lambda: plan(CONFIG, H100, context=200_000, prompt=1), "context is 200000; .* between 1 and 131072"),
        (lambda: plan(CONFIG, H100, context=10, prompt=11), "prompt is 11; .* the context, 10"),
        (lambda: plan(CONFIG, H100, context=10, prompt=1, memory_fraction=1.5), "memory_fraction is 1.5"),
        (lambda: plan(CONFIG, H100, context=10, prompt=1, batches=[]), r"batches are \[\]; give at least one"),
        (lambda: plan(CONFIG, H100, context=10, prompt=1, price=-1), "price is -1"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_measured_phase_has_the_utilisation_that_was_reached():
    step = predict_decode(Deployment(preset("llama-3.1-8b")), H100, batch=1, context=1024)
    slower = step.measured(2 * step.seconds)
    assert (slower.counts, slower.seconds) == (step.counts, 2 * step.seconds)
    assert (slower.mfu, slower.mbu) == pytest.approx((step.mfu / 2, step.mbu / 2))
    assert slower.flops_per_second == pytest.approx(slower.mfu * H100.peak("bfloat16"))
