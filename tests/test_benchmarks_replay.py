"""The replay of request traces: reading and generating them, what a server is given, and what is made of its times."""

import dataclasses
import itertools
import json
import re
import types

import jax
import numpy as np
import pytest
import scipy.stats

from ridgeline.benchmarks import replay, request_trace, trace_fit
from ridgeline.cli import main
from ridgeline.decode import buckets
from tiny import tiny_model

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"

# Of the Azure conversation trace of 2023, which the generator is fitted to.
TRACE_QUANTILES = {
    "prompt_tokens": {0.1: 207, 0.5: 1020, 0.9: 2734, 0.99: 4142},
    "output_tokens": {0.1: 54, 0.5: 129, 0.9: 424, 0.99: 601},
}
TRACE_GAPS = {0.1: 0.089, 0.5: 0.655, 0.9: 2.326, 0.99: 4.92}
TRACE_DISPERSION = {5: 1.34, 50: 3.76, 300: 14.5}


@pytest.fixture
def run(tmp_path):
    """Runs the command with arguments; returns what it stored."""

    def run(*arguments):
        out = tmp_path / "replay.json"
        assert main(["bench", "replay", *map(str, arguments), "--output", str(out)]) == 0
        return json.loads(out.read_text())

    return run


@pytest.fixture
def write(tmp_path):
    def write(text):
        file = tmp_path / "trace.csv"
        file.write_text(text)
        return file

    return write


def tuples(trace):
    return [dataclasses.astuple(request) for request in trace]


# --- reading ---


def test_a_trace_is_read_with_times_from_its_first_request(write):
    lines = "2023-11-16 23:59:59.7500000,374,44\n2023-11-17 00:00:01.2500000,396,109\n"
    assert tuples(request_trace.read_trace(write(HEAD + lines))) == [(0.0, 374, 44), (1.5, 396, 109)]


def test_seconds_zones_and_further_columns_are_read(write):
    read = request_trace.read_trace
    assert tuples(read(write("id,GeneratedTokens,ContextTokens,TIMESTAMP\na,1,2,10.5\nb,3,4,12\n"))) == [
        (0.0, 2, 1),
        (1.5, 4, 3),
    ]
    assert tuples(read(write(HEAD + "2024-05-10 00:00:00+00:00,1,1\n2024-05-10 01:00:02+01:00,1,1\n")))[1][0] == 2.0


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
        request_trace.read_trace(write(text))
    assert all(part in str(error.value) for part in told), error.value


# --- generating ---


@pytest.fixture
def drawn():
    return request_trace.generate_trace(20_000, 3, request_trace.CONVERSATION)


def test_generated_lengths_have_the_quantiles_of_the_trace(drawn):
    for name, quantiles in TRACE_QUANTILES.items():
        found = np.quantile([getattr(request, name) for request in drawn], list(quantiles))
        np.testing.assert_allclose(found, list(quantiles.values()), rtol=0.1)


def test_generated_outputs_depend_on_prompts_as_in_the_trace(drawn):
    outputs = [request.output_tokens for request in drawn if 1020 <= request.prompt_tokens < 1130]
    np.testing.assert_allclose(np.quantile(outputs, (0.1, 0.5, 0.9)), (377, 407, 491), rtol=0.1)
    assert np.median([request.output_tokens for request in drawn if request.prompt_tokens > 2734]) < 100


def test_generated_arrivals_are_as_bursty_as_the_trace():
    traces = [request_trace.generate_trace(20_000, seed, request_trace.CONVERSATION) for seed in range(20)]
    times = [np.array([request.arrival for request in trace]) for trace in traces]
    gaps = np.concatenate([np.diff(each) / np.diff(each).mean() for each in times])
    np.testing.assert_allclose(np.quantile(gaps, list(TRACE_GAPS)), list(TRACE_GAPS.values()), rtol=0.1)
    for window, expected in TRACE_DISPERSION.items():
        found = np.mean([trace_fit.dispersion(each, window) for each in times])
        assert found == pytest.approx(expected, rel=0.15), window
    assert np.mean([len(each) / each[-1] for each in times]) == pytest.approx(5.53, rel=0.05)


def test_equal_seeds_draw_equal_traces_and_a_shorter_one_is_the_beginning():
    generate, workload = request_trace.generate_trace, request_trace.CONVERSATION
    trace = generate(50, 7, workload)
    assert generate(50, 7, workload) == trace
    assert generate(20, 7, workload) == trace[:20]
    assert generate(50, 8, workload)[1:] != trace[1:]
    assert trace[0].arrival == 0
    assert all(one.arrival <= other.arrival for one, other in itertools.pairwise(trace))


def test_the_rate_scales_arrivals_alone():
    generate, workload = request_trace.generate_trace, request_trace.CONVERSATION
    slow, fast = generate(50, 1, workload, rate=2.0), generate(50, 1, workload, rate=8.0)
    for one, other in zip(slow, fast, strict=True):
        assert one.arrival == pytest.approx(4 * other.arrival)
        assert dataclasses.astuple(one)[1:] == dataclasses.astuple(other)[1:]
    with pytest.raises(ValueError, match=r"rate is 0\.0"):
        generate(5, 1, workload, rate=0.0)
    with pytest.raises(ValueError, match="0 requests"):
        generate(0, 1, workload)


def test_a_fit_recovers_what_a_trace_was_drawn_from():
    poisson = request_trace.Workload(
        rate=3.0,
        gap_shape=1.0,
        rate_std=0.0,
        rate_memory=1,
        longest=(4096, 4096),
        kinds=(request_trace.Kind(0.7, 5.0, 0.2, 4.0, 0.3), request_trace.Kind(0.3, 7.0, 0.3, 6.0, 0.1)),
    )
    fitted = trace_fit.fit_workload(request_trace.generate_trace(6000, 0, poisson), kinds=2)
    assert fitted.rate == pytest.approx(3.0, rel=0.05)
    assert fitted.gap_shape == pytest.approx(1.0, abs=0.1)
    assert fitted.rate_std < 0.1
    for found, expected in zip(fitted.kinds, poisson.kinds, strict=True):
        np.testing.assert_allclose(dataclasses.astuple(found), dataclasses.astuple(expected), atol=0.03)


def test_a_fit_finds_the_drift_of_the_rate():
    workload = dataclasses.replace(request_trace.CONVERSATION, rate_std=0.6, rate_memory=100, gap_shape=2.0)
    fitted = trace_fit.fit_workload(request_trace.generate_trace(20_000, 0, workload), kinds=2)
    assert fitted.rate_std == pytest.approx(0.6, rel=0.2)
    assert fitted.rate_memory == pytest.approx(100, rel=0.5)
    assert fitted.gap_shape == pytest.approx(2.0, rel=0.2)


def test_what_cannot_be_fitted_is_refused():
    request = request_trace.TraceRequest(0.0, 10, 10)
    with pytest.raises(ValueError, match="has 3 requests"):
        trace_fit.fit_workload([request] * 3)
    with pytest.raises(ValueError, match="at one time"):
        trace_fit.fit_workload([request] * 1000)


def test_distances_and_dispersion_are_those_of_their_definitions():
    rng = np.random.default_rng(0)
    one, other = rng.normal(size=300), rng.normal(0.3, 1.2, size=200)
    expected = scipy.stats.ks_2samp(one, other).statistic
    assert trace_fit.ks_distance(one, other) == pytest.approx(expected)
    times = np.array([0.0, 0.1, 0.2, 0.3, 1.5, 2.5, 4.0])  # 6 gaps; windows of 1.5 of them last 1: counts 4, 1, 1
    assert trace_fit.dispersion(times, 1.5) == pytest.approx(np.var([4, 1, 1]) / 2)


def test_the_fit_program_prints_trace_and_generator(capsys, write):
    trace = request_trace.generate_trace(600, 0, request_trace.CONVERSATION)
    file = write(HEAD + "".join(f"{time},{prompt},{output}\n" for time, prompt, output in tuples(trace)))
    assert main(["bench", "replay", "--fit", str(file)]) == 0
    printed = capsys.readouterr().out
    median = np.median([request.output_tokens for request in trace])
    assert len(re.findall(rf" output tokens, median +{median:.4g} ", printed)) == 2
    assert "generator fitted to this trace: 600 requests" in printed
    assert "generator as it ships: 600 requests" in printed


# --- measures ---


def test_measures_of_a_hand_computed_replay():
    served = [
        replay.Served(1.0, [1.5, 1.75, 2.0]),  # TTFT 0.5, TPOT 0.25, end to end 1
        replay.Served(2.0, [4.0]),  # TTFT 2
        replay.Served(3.0, [3.25, 4.25]),  # TTFT 0.25, TPOT 1
        replay.Served(4.0, [4.5, 4.75, 5.0]),  # as the first
    ]
    found = replay.summarize(served, ttft_limit=0.5, tpot_limit=0.25)
    assert found["requests"] == 4
    assert found["seconds"] == 4.0
    assert found["ttft"] == pytest.approx({"p50": 0.5, "p90": 1.55, "p99": 1.955})
    assert found["tpot"] == pytest.approx({"p50": 0.25, "p90": 0.85, "p99": 0.985})
    assert found["end_to_end"] == pytest.approx({"p50": 1.125, "p90": 1.775, "p99": 1.9775})
    assert found["requests_per_s"] == 1.0
    assert found["output_tokens_per_s"] == 9 / 4
    assert found["goodput"] == {"share": 0.5, "requests_per_s": 0.5}  # limits may be reached: first and last


def test_percentiles_of_one_request_and_of_none():
    assert replay.percentiles([0.3]) == {"p50": 0.3, "p90": 0.3, "p99": 0.3}
    single = replay.summarize([replay.Served(0.0, [2.0])], ttft_limit=2.0, tpot_limit=0.1)
    assert single["tpot"] is None
    assert single["ttft"] == single["end_to_end"] == {"p50": 2.0, "p90": 2.0, "p99": 2.0}
    assert single["goodput"] == {"share": 1.0, "requests_per_s": 0.5}
    trace = {"requests": 1, "requests_per_s": None, "clamped": 0, "max_position": 8}
    report = {"result": single, "trace": trace, "subject": "story", "compiled_while_serving": 0}
    table, _ = replay.show(report)
    assert [row[1] for row in table.rows] == ["2000.0", "-", "2000.0"]
    assert [figure.what for figure in replay.figures(report)] == ["TTFT, p99"]


@pytest.mark.parametrize(
    ("ttft", "tpot", "good"), [(0.5, 0.25, True), (0.499, 0.25, False), (0.5, 0.249, False), (0.4, 0.2, False)]
)
def test_both_limits_must_be_met(ttft, tpot, good):
    assert replay.Served(1.0, [1.5, 1.75, 2.0]).meets(ttft, tpot) is good


# --- what a server is given ---


def test_scaled_and_clamped_requests():
    request = request_trace.TraceRequest
    trace = [request(0.0, 100, 30), request(8.0, 1, 1), request(9.0, 400, 500)]
    scaled = request_trace.scale(trace, lengths=0.25, speed=2.0)
    assert tuples(scaled) == [(0.0, 25, 8), (4.0, 1, 1), (4.5, 100, 125)]
    fitting, cut = request_trace.clamp(scaled, 64)
    assert tuples(fitting) == [(0.0, 25, 8), (4.0, 1, 1), (4.5, 1, 63)]
    assert cut == 1
    fitting, cut = request_trace.clamp(scaled, 32)
    assert tuples(fitting)[0] == (0.0, 24, 8)  # the prompt gives way
    assert cut == 2


def test_prompts_have_the_lengths_asked_for_and_follow_the_seed():
    trace = [request_trace.TraceRequest(0.5, 7, 3), request_trace.TraceRequest(1.5, 2, 4)]
    jobs = replay.make_jobs(trace, 100, 0)
    assert [(job.arrival, len(job.prompt), job.output_tokens) for job in jobs] == [(0.5, 7, 3), (1.5, 2, 4)]
    assert all(0 <= token < 100 for job in jobs for token in job.prompt)
    assert replay.make_jobs(trace, 100, 0) == jobs
    assert replay.make_jobs(trace, 100, 1) != jobs


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


def test_waiting_for_earlier_batches_counts(monkeypatch):
    clock, batches = Clock(), []

    def stream(model, prompts, params, *, max_batch_size, kv_dtype):
        """One second for the first tokens, and one a token after them; a finished row waits for the batch."""
        batches.append(len(prompts))
        wanted = [each.max_tokens for each in params]
        for step in range(max(wanted)):
            clock.now += 1.0
            for row in range(len(prompts)):
                if step < wanted[row]:
                    done = object() if step + 1 == wanted[row] else None
                    yield types.SimpleNamespace(index=row, tokens=[0], output=done)

    monkeypatch.setattr(replay, "stream", stream)
    arrivals = [(2.0, 3), (2.5, 1), (3.0, 2), (3.5, 1), (20.0, 1)]
    jobs = [replay.Job(arrival, (1, 2), tokens) for arrival, tokens in arrivals]
    server = replay.InOrder(tiny_model(), 2, clock=clock, sleep=clock.sleep)
    served = replay.replay(server.serve, jobs)
    assert batches == [1, 2, 1, 1]  # the first finds nobody else; at 5 two of three that wait fit
    assert [list(each.times) for each in served] == [[3.0, 4.0, 5.0], [6.0], [6.0, 7.0], [8.0], [21.0]]
    assert [each.ttft for each in served] == [1.0, 3.5, 3.0, 4.5, 1.0]
    assert [each.tpot for each in served] == [1.0, None, 1.0, None, None]


@pytest.mark.parametrize(
    ("results", "told"),
    [
        ([(0, [1.5, 1.6])], "finished 1 of 2"),
        ([(0, [1.5, 1.6]), (1, [2.5])], "gave 1"),
        ([(0, [0.5, 1.6]), (1, [2.5, 2.6])], "the first at 0.500 s"),
        ([(0, [])], "gave 0"),
    ],
)
def test_a_server_that_is_wrong_is_not_measured(results, told):
    jobs = [replay.Job(1.0, (1,), 2), replay.Job(2.0, (1,), 2)]
    with pytest.raises(RuntimeError, match=told):
        replay.replay(lambda jobs: iter(results), jobs)


def test_warm_up_covers_the_shapes_of_every_batch():
    jobs = [replay.Job(0.0, (1,) * prompt, output) for prompt, output in [(10, 5), (12, 6), (200, 100), (9, 9)]]
    found = replay.representatives(jobs, 2)
    # Alone: 16 of 128 positions, then 256 of 512. In pairs: the first two are of the small shape, the others large.
    assert found == [jobs[:1], jobs[:2], jobs[1:3], jobs[2:3]]
    assert replay.representatives(jobs[:2], 1) == [jobs[:1]]
    long = [replay.Job(0.0, (1,) * prompt, 24) for prompt in (2000, 1000, 1900, 1100)]
    assert replay.representatives(long, 1) == [
        long[:1],
        long[1:2],
        long[3:],  # its second chunk is shorter; 1,900 is as 2,000
    ]


def test_nothing_is_compiled_while_the_clock_runs(monkeypatch):
    monkeypatch.setattr(buckets, "PREFILL_CHUNK", 32)
    model = tiny_model(eos_token_ids=tuple(range(509)))  # every token would end a request
    trace = [request_trace.TraceRequest(0.0, prompt, output) for prompt, output in [(90, 30), (70, 12), (20, 1)]]
    jobs = replay.make_jobs(trace, 509, 0)
    server = replay.InOrder(model, 1)
    with replay.counted_compilations() as compilations:
        server.warm_up(jobs)
        warm = compilations()
        served = replay.replay(server.serve, jobs)
        assert warm > 0
        assert compilations() == warm
    assert [len(each.times) for each in served] == [30, 12, 1]
    jax.jit(lambda x: x + 3)(1)
    assert compilations() == warm  # no longer counted


# --- the program ---


def test_a_replay_with_the_bundled_model(run, write):
    file = write(HEAD + "0,100,2\n0.01,60,4\n0.02,5000,6\n9,9,9\n")
    arguments = ("--trace", file, "--requests", 3, "--scale-lengths", 0.5, "--speed", 2, "--max-batch", 2)
    stored = run(*arguments, "--ttft-limit", 1000, "--tpot-limit", 1000)
    assert stored["benchmark"] == "replay"
    assert (stored["model"]["name"], stored["model"]["dtype"]) == ("bundled", "bfloat16")
    trace = stored["trace"]
    assert (trace["source"], trace["requests"], trace["clamped"]) == ("trace.csv", 3, 1)
    assert trace["requests_per_s"] == pytest.approx(2 / 0.01)
    assert trace["prompt_tokens"]["p50"] == 50
    assert stored["compiled_while_serving"] == 0
    result = stored["result"]
    assert result["requests"] == 3
    assert result["goodput"]["share"] == 1.0
    tokens = 1 + 2 + 3
    assert result["output_tokens_per_s"] == pytest.approx(tokens / result["seconds"])
    assert 0 < result["ttft"]["p50"] <= result["end_to_end"]["p50"] <= result["seconds"]
    assert "hardware" in stored
    assert str(file.parent) not in json.dumps(stored)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--requests", "0"], "'0' is not a positive integer"),
        (["--speed", "nan"], "'nan' is not a positive number"),
        (["--trace", "absent.csv"], "absent.csv"),
        (["--trace", "absent.csv", "--rate", "2"], "change a trace's with --speed"),
        (["no-such-directory"], "no-such-directory"),
        (["bundled", "--layers", "2"], "has weights of its own"),
    ],
)
def test_bad_usage_is_told_before_any_work(capsys, arguments, told):
    assert main(["bench", "replay", *arguments]) == (1 if told == "absent.csv" else 2)  # a file is no argument
    assert told in capsys.readouterr().err


def test_a_plot_shows_both_distributions_and_limits(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **_: drawn.append(self))
    limits = {"ttft": 0.15, "tpot": 0.05}
    replay.plot({"result": {"limits": limits}, "ttft": [0.1, 0.2], "tpot": [0.2]}, tmp_path / "plot.png")
    ttft, tpot = drawn[0].axes
    assert [line.get_xdata()[-1] for line in ttft.lines] == [200.0, 150.0]  # the longest, the limit
    assert [line.get_xdata()[-1] for line in tpot.lines] == [pytest.approx(200.0), 50.0]
