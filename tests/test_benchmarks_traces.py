"""Request traces: read from files and written, generated, fitted, and scaled."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import scipy.stats

from ridgeline.benchmarks.conversations import Conversations, generate_conversations
from ridgeline.benchmarks.request_trace import CONVERSATION, Kind, TraceRequest, Workload, clamp, generate_trace, scale
from ridgeline.benchmarks.trace_files import read_trace, write_trace
from ridgeline.benchmarks.trace_fit import dispersion, fit_workload, ks_distance

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

# Of the Azure conversation trace of 2023, which the generator is fitted to.
TRACE_QUANTILES = {
    "prompt_tokens": {0.1: 207, 0.5: 1020, 0.9: 2734, 0.99: 4142},
    "output_tokens": {0.1: 54, 0.5: 129, 0.9: 424, 0.99: 601},
}
TRACE_GAPS = {0.1: 0.089, 0.5: 0.655, 0.9: 2.326, 0.99: 4.92}
TRACE_DISPERSION = {5: 1.34, 50: 3.76, 300: 14.5}


@pytest.fixture
def write(tmp_path):
    def write(text, name="trace.csv"):
        file = tmp_path / name
        file.write_text(text)
        return file

    return write


def tuples(trace):
    return [(request.arrival, request.prompt_tokens, request.output_tokens) for request in trace]


# --- reading ---


def test_a_trace_is_read_with_times_from_its_first_request(write):
    lines = "2023-11-16 23:59:59.7500000,374,44\n2023-11-17 00:00:01.2500000,396,109\n"
    assert tuples(read_trace(write(HEAD + lines))) == [(0.0, 374, 44), (1.5, 396, 109)]


def test_seconds_zones_and_further_columns_are_read(write):
    assert tuples(read_trace(write("id,GeneratedTokens,ContextTokens,TIMESTAMP\na,1,2,10.5\nb,3,4,12\n"))) == [
        (0.0, 2, 1),
        (1.5, 4, 3),
    ]
    assert (
        tuples(read_trace(write(HEAD + "2024-05-10 00:00:00+00:00,1,1\n2024-05-10 01:00:02+01:00,1,1\n")))[1][0] == 2.0
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (HEAD + "1,5,5\nnoon,5,5\n", ["line 3", "TIMESTAMP is 'noon'", "2023-11-16"]),
        (HEAD + "1,5,5\nnan,5,5\n", ["line 3", "TIMESTAMP is 'nan'"]),
        (HEAD + "1,5.5,5\n", ["line 2", "ContextTokens is '5.5'", "whole number"]),
        (HEAD + "1,5,0\n", ["line 2", "GeneratedTokens is '0'", "at least 1"]),
        (HEAD + "1,-3,5\n", ["line 2", "ContextTokens is '-3'"]),
        (HEAD + "1,5\n", ["line 2", "GeneratedTokens is None"]),
        (HEAD + "5,5,5\n4.5,5,5\n", ["line 3", "'4.5'", "sort the file"]),
        ("time,ContextTokens,GeneratedTokens\n1,1,1\n", ["line 1", "no column TIMESTAMP", "'time'"]),
        (HEAD, ["has no requests"]),
        ("", ["line 1", "found nothing"]),
    ],
)
def test_a_bad_line_is_told_with_its_number_and_value(write, text, told):
    with pytest.raises(ValueError, match=r"trace\.csv") as error:
        read_trace(write(text))
    assert all(part in str(error.value) for part in told), error.value


def line(**changes):
    return json.dumps({"timestamp": 0, "input_length": 600, "output_length": 5, "hash_ids": [0, 1]} | changes) + "\n"


def test_mooncake_s_lines_are_read_and_written(write, tmp_path):
    text = line(timestamp=27_500) + "\n" + line(timestamp=28_750.0, input_length=512, hash_ids=[7])
    trace = read_trace(write(text, "trace.jsonl"))
    assert trace == [TraceRequest(0.0, 600, 5, (0, 1)), TraceRequest(1.25, 512, 5, (7,))]
    again = [*trace, TraceRequest(2.0, 1025, 1)]  # shares nothing: its ids are new
    write_trace(again, tmp_path / "written.jsonl")
    assert read_trace(tmp_path / "written.jsonl") == [*trace, TraceRequest(2.0, 1025, 1, (8, 9, 10))]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", ["line 2", "is no JSON", "one object a line"]),
        ("[1]", ["line 2", "is [1]", "an object with timestamp"]),
        (line().replace("hash_ids", "ids"), ["line 2", "no field hash_ids"]),
        (line(timestamp="noon"), ["line 2", "timestamp is 'noon'", "milliseconds"]),
        (line(timestamp=float("inf")), ["line 2", "timestamp is inf"]),
        (line(timestamp=-1), ["line 2", "timestamp -1", "sort the file"]),
        (line(input_length=0), ["line 2", "input_length is 0", "at least 1"]),
        (line(output_length=True), ["line 2", "output_length is True"]),
        (line(hash_ids=3), ["line 2", "hash_ids is 3", "a list"]),
        (line(hash_ids=[0, -1]), ["line 2", "hash_ids is [0, -1]"]),
        (line(hash_ids=[0]), ["line 2", "has 1 ids", "600 is 2 blocks of 512", "one id a block"]),
    ],
)
def test_a_bad_line_of_json_is_told_with_its_number_and_value(write, text, told):
    with pytest.raises(ValueError, match=r"trace\.jsonl") as error:
        read_trace(write(line() + text, "trace.jsonl"))
    assert all(part in str(error.value) for part in told), error.value


# --- generating ---


@pytest.fixture
def drawn():
    return generate_trace(20_000, 3, CONVERSATION)


def test_generated_lengths_have_the_quantiles_of_the_trace(drawn):
    for name, quantiles in TRACE_QUANTILES.items():
        found = np.quantile([getattr(request, name) for request in drawn], list(quantiles))
        np.testing.assert_allclose(found, list(quantiles.values()), rtol=0.1)


def test_generated_outputs_depend_on_prompts_as_in_the_trace(drawn):
    outputs = [request.output_tokens for request in drawn if 1020 <= request.prompt_tokens < 1130]
    np.testing.assert_allclose(np.quantile(outputs, (0.1, 0.5, 0.9)), (377, 407, 491), rtol=0.1)
    assert np.median([request.output_tokens for request in drawn if request.prompt_tokens > 2734]) < 100


def test_generated_arrivals_are_as_bursty_as_the_trace():
    traces = [generate_trace(20_000, seed, CONVERSATION) for seed in range(20)]
    times = [np.array([request.arrival for request in trace]) for trace in traces]
    gaps = np.concatenate([np.diff(each) / np.diff(each).mean() for each in times])
    np.testing.assert_allclose(np.quantile(gaps, list(TRACE_GAPS)), list(TRACE_GAPS.values()), rtol=0.1)
    for window, expected in TRACE_DISPERSION.items():
        found = np.mean([dispersion(each, window) for each in times])
        assert found == pytest.approx(expected, rel=0.15), window
    assert np.mean([len(each) / each[-1] for each in times]) == pytest.approx(5.53, rel=0.05)


def test_equal_seeds_draw_equal_traces_and_a_shorter_one_is_the_beginning():
    generate, workload = generate_trace, CONVERSATION
    trace = generate(50, 7, workload)
    assert generate(50, 7, workload) == trace
    assert generate(20, 7, workload) == trace[:20]
    assert generate(50, 8, workload)[1:] != trace[1:]
    assert trace[0].arrival == 0
    assert all(one.arrival <= other.arrival for one, other in itertools.pairwise(trace))


def test_the_rate_scales_arrivals_alone():
    generate, workload = generate_trace, CONVERSATION
    slow, fast = generate(50, 1, workload, rate=2.0), generate(50, 1, workload, rate=8.0)
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival == pytest.approx(4 * other.arrival)
        assert dataclasses.astuple(one)[1:] == dataclasses.astuple(other)[1:]
    with pytest.raises(ValueError, match=r"rate is 0\.0"):
        generate(5, 1, workload, rate=0.0)
    with pytest.raises(ValueError, match="0 requests"):
        generate(0, 1, workload)


def test_a_fit_recovers_what_a_trace_was_drawn_from():
    poisson = Workload(
        rate=3.0,
        gap_shape=1.0,
        rate_std=0.0,
        rate_memory=1,
        longest=(4096, 4096),
        kinds=(Kind(0.7, 5.0, 0.2, 4.0, 0.3), Kind(0.3, 7.0, 0.3, 6.0, 0.1)),
    )
    fitted = fit_workload(generate_trace(6000, 0, poisson), kinds=2)
    assert fitted.rate == pytest.approx(3.0, rel=0.05)
    assert fitted.gap_shape == pytest.approx(1.0, abs=0.1)
    assert fitted.rate_std < 0.1
    for found, expected in zip(fitted.kinds, poisson.kinds, strict=True):
        np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), atol=0.03)


def test_a_fit_finds_the_drift_of_the_rate():
    workload = dataclasses.replace(CONVERSATION, rate_std=0.6, rate_memory=100, gap_shape=2.0)
    fitted = fit_workload(generate_trace(20_000, 0, workload), kinds=2)
    assert fitted.rate_std == pytest.approx(0.6, rel=0.2)
    assert fitted.rate_memory == pytest.approx(100, rel=0.5)
    assert fitted.gap_shape == pytest.approx(2.0, rel=0.2)


def test_what_cannot_be_fitted_is_refused():
    request = TraceRequest(0.0, 10, 10)
    with pytest.raises(ValueError, match="has 3 requests"):
        fit_workload([request] * 3)
    with pytest.raises(ValueError, match="at one time"):
        fit_workload([request] * 1000)


def test_distances_and_dispersion_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=300), rng.normal(0.3, 1.2, size=200)
    expected = scipy.stats.ks_2samp(one, other).statistic
    assert ks_distance(one, other) == pytest.approx(expected)
    times = np.array([0.0, 0.1, 0.2, 0.3, 1.5, 2.5, 4.0])  # 6 gaps; windows of 1.5 of them last 1: counts 4, 1, 1
    assert dispersion(times, 1.5) == pytest.approx(np.var([4, 1, 1]) / 2)


# --- conversations ---


def turns_of(trace):
    """The requests of each conversation, which share a block after those of the system prompt."""
    shared = Conversations().system_blocks
    return [list(turns) for _, turns in itertools.groupby(sorted(trace, key=key_of), lambda r: r.blocks[shared])]


def key_of(request):
    return request.blocks[Conversations().system_blocks], request.arrival


def test_each_turn_begins_with_the_prompt_and_the_output_before_it():
    workload = Conversations()
    trace = generate_conversations(400, 0, workload)
    assert [request.arrival for request in trace] == sorted(request.arrival for request in trace)
    conversations = turns_of(trace)
    assert sum(len(turns) > 2 for turns in conversations) > 20
    for turns in conversations:
        for before, after in itertools.pairwise(turns):
            assert after.prompt_tokens > before.prompt_tokens + before.output_tokens
            assert after.blocks[: len(before.blocks)] == before.blocks
            assert after.arrival > before.arrival
        for turn in turns:
            assert len(turn.blocks) == -(-turn.prompt_tokens // 512)
            assert turn.prompt_tokens + turn.output_tokens <= workload.longest
    systems = {request.blocks[: workload.system_blocks] for request in trace}
    assert systems == {(0, 1), (2, 3), (4, 5), (6, 7)}
    own = [set(turns[-1].blocks[workload.system_blocks :]) for turns in conversations]
    assert sum(map(len, own)) == len(set.union(*own))  # nobody has another's


def test_conversations_come_at_their_rate_and_follow_the_seed():
    workload = Conversations()
    trace = generate_conversations(3000, 1, workload)
    assert 3000 / trace[-1].arrival == pytest.approx(workload.rate, rel=0.15)
    assert 3000 / len(turns_of(trace)) == pytest.approx(workload.turns, rel=0.15)
    assert generate_conversations(40, 1, workload) == trace[:40]
    assert generate_conversations(40, 2, workload) != trace[:40]
    slow = generate_conversations(3000, 1, workload, rate=0.5)
    assert 3000 / slow[-1].arrival == pytest.approx(0.5, rel=0.15)


# --- scaling ---


def test_scaled_and_clamped_requests():
    request = TraceRequest
    trace = [request(0.0, 100, 30), request(8.0, 1, 1), request(9.0, 400, 500)]
    scaled = scale(trace, lengths=0.25, speed=2.0)
    assert tuples(scaled) == [(0.0, 25, 8), (4.0, 1, 1), (4.5, 100, 125)]
    fitting, cut = clamp(scaled, 64)
    assert tuples(fitting) == [(0.0, 25, 8), (4.0, 1, 1), (4.5, 1, 63)]
    assert cut == 1
    fitting, cut = clamp(scaled, 32)
    assert tuples(fitting)[0] == (0.0, 24, 8)  # the prompt gives way
    assert cut == 2


@pytest.mark.parametrize("lengths", [0.01, 0.1, 0.37, 1.5])
def test_prompts_that_begin_alike_do_so_scaled(lengths):
    trace = generate_conversations(60, 0, Conversations())
    for request, small in zip(trace, scale(trace, lengths=lengths, speed=1.0), strict=True):
        assert small.blocks == request.blocks
        assert small.block_tokens == max(1, round(512 * lengths))
        assert small.prompt_tokens <= len(small.blocks) * small.block_tokens
        assert small.prompt_tokens == pytest.approx(
            request.prompt_tokens * lengths, rel=0.05, abs=2 + len(small.blocks)
        )
