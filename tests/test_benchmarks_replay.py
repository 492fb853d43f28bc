"""The replay of request traces: what a server is given, what is made of its times, and the command."""

import json
import re
import types

import jax
import numpy as np
import pytest

import ridgeline as rl
from ridgeline.benchmarks import replay
from ridgeline.benchmarks.conversations import Conversations, generate_conversations
from ridgeline.benchmarks.request_trace import CONVERSATION, TraceRequest, generate_trace, scale
from ridgeline.benchmarks.served import Served, allowed_hit_rate, percentiles, summarize
from ridgeline.benchmarks.servers import GREEDY, Job, counted_compilations, make_jobs, on_engine
from ridgeline.benchmarks.servers import replay as served_by
from ridgeline.benchmarks.stages import TINY
from ridgeline.benchmarks.trace_files import read_trace
from ridgeline.cli import main
from tiny import tiny_config, tiny_model

HEAD = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


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


def full_attention(**changes):
    """A model whose layers keep all positions."""
    return tiny_model(tiny_config(layers=(rl.LayerConfig(rl.RopeConfig(rotary_dim=20)),)), **changes)


# --- measures ---


def test_measures_of_a_hand_computed_replay():
    served = [
        Served(1.0, [1.5, 1.75, 2.0]),  # TTFT 0.5, TPOT 0.25, end to end 1
        Served(2.0, [4.0], prompt_tokens=10),  # TTFT 2
        Served(3.0, [3.25, 4.25]),  # TTFT 0.25, TPOT 1
        Served(4.0, [4.5, 4.75, 5.0]),  # as the first
    ]
    found = summarize(served, ttft_limit=0.5, tpot_limit=0.25)  # which may be reached: first and last
    expected = {
        "duration": 4.0, "completed": 4, "total_input_tokens": 10, "total_output_tokens": 9,
        "request_throughput": 1.0, "output_throughput": 9 / 4, "total_token_throughput": 19 / 4,
        "max_concurrent_requests": 2, "request_goodput": 0.5, "good_share": 0.5,
        "mean_ttft_ms": 812.5, "median_ttft_ms": 500, "p90_ttft_ms": 1550, "p99_ttft_ms": 1955,
        "median_tpot_ms": 250, "p90_tpot_ms": 850, "p99_tpot_ms": 985,
        "mean_itl_ms": 400, "median_itl_ms": 250, "std_itl_ms": 300,
        "median_e2el_ms": 1125, "p90_e2el_ms": 1775, "p99_e2el_ms": 1977.5,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def a_run(result, **changes):
    """A run of the engine, as it is stored."""
    run = {"server": "engine", "speed": 1.0, "cache_tokens": 512, "compiled_while_serving": 0, "result": result}
    return run | {"prefix_hit_rate": 0.25, "preemptions": 0, "ttft": [0.1, 0.2], "tpot": [0.2]} | changes


def test_percentiles_of_one_request_and_of_none():
    assert percentiles([0.3]) == {"p50": 0.3, "p90": 0.3, "p99": 0.3}
    single = summarize([Served(0.0, [2.0])], ttft_limit=2.0, tpot_limit=0.1)
    assert single["mean_tpot_ms"] is single["p99_itl_ms"] is None
    assert single["median_ttft_ms"] == single["p99_ttft_ms"] == single["p90_e2el_ms"] == 2000
    assert (single["good_share"], single["request_goodput"]) == (1.0, 0.5)
    trace = {"requests": 1, "requests_per_s": None, "clamped": 0, "max_position": 8, "prefix_hit_rate": 0.5}
    report = {"runs": [a_run(single)], "trace": trace, "subject": "story", "limits": {"ttft": 2.0, "tpot": 0.1}}
    table, note = replay.show(report)
    assert table.columns == ("", "engine, 512")
    cells = dict(table.rows)
    assert (cells["Mean TTFT (ms)"], cells["P99 TPOT (ms)"], cells["Median E2EL (ms)"]) == ("2000.00", "-", "2000.00")
    assert "a pool without end would have 50.0%" in note
    assert [figure.what for figure in replay.figures(report)] == ["engine, 512, speed 1: P99 TTFT"]


@pytest.mark.parametrize(
    ("ttft", "tpot", "good"), [(0.5, 0.25, True), (0.499, 0.25, False), (0.5, 0.249, False), (0.4, 0.2, False)]
)
def test_both_limits_must_be_met(ttft, tpot, good):
    assert Served(1.0, [1.5, 1.75, 2.0]).meets(ttft, tpot) is good


@pytest.mark.parametrize(
    ("prompts", "pages"),
    [
        ([[1, 2, 3, 4, 5]], 0),
        ([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]], 2),
        ([[1, 2, 3, 4], [1, 2, 3, 4]], 1),  # the last token must be run
        ([[1, 2, 9, 4, 5], [1, 2, 3, 4, 5]], 1),
        ([[9, 2, 3, 4, 5], [1, 2, 3, 4, 5]], 0),  # equal pages after unequal ones are not equal
        ([[1, 2, 3], [1, 2, 4, 5, 6], [1, 2, 4, 5, 7]], 3),
        ([[1], [1]], 0),
    ],
)
def test_pages_of_two_tokens_that_a_trace_allows_to_be_found(prompts, pages):
    assert allowed_hit_rate(prompts, 2) == 2 * pages / sum(map(len, prompts))


def test_an_engine_with_a_large_pool_finds_what_the_trace_allows():
    workload = Conversations(systems=2, turns=3.0, longest=4096)
    trace = scale(generate_conversations(25, 3, workload), lengths=0.12, speed=1.0)
    jobs = make_jobs(trace, 509, 0)
    with rl.Engine(full_attention(), 1, cache_tokens=16384, max_length=512, prefill_tokens=64) as engine:
        for job in jobs:
            engine.submit(job.prompt, rl.SamplingParams(max_tokens=1))
            for _ in engine.run():
                pass
        allowed = allowed_hit_rate((job.prompt for job in jobs), 64)
        assert engine.stats().prefix_hit_rate == allowed
    assert 0.2 < allowed < 0.95


# --- what a server is given ---


def test_prompts_have_the_lengths_asked_for_and_follow_the_seed():
    trace = [TraceRequest(0.5, 7, 3), TraceRequest(1.5, 2, 4)]
    jobs = make_jobs(trace, 100, 0)
    assert [(job.arrival, len(job.prompt), job.output_tokens) for job in jobs] == [(0.5, 7, 3), (1.5, 2, 4)]
    assert all(0 <= token < 100 for job in jobs for token in job.prompt)
    assert make_jobs(trace, 100, 0) == jobs
    assert make_jobs(trace, 100, 1) != jobs


def test_equal_blocks_are_equal_tokens_wherever_they_end():
    blocks = [(5, 6), (5, 7), (5, 6, 8)]
    trace = [TraceRequest(0.0, tokens, 1, ids, 4) for tokens, ids in zip((7, 8, 10), blocks, strict=True)]
    first, second, third = (job.prompt for job in make_jobs(trace, 1000, 0))
    assert (len(first), len(second), len(third)) == (7, 8, 10)
    assert first[:4] == second[:4] == third[:4]
    assert first == third[:7]
    assert not set(second[4:]) & set(third[4:])


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class PretendedEngine(rl.Engine):
    """Gives every request that runs, two at most, a token a step, which takes a second."""

    def __init__(self, clock):
        self.clock, self.left, self.submitted = clock, {}, []

    @property
    def has_work(self):
        return bool(self.left)

    def submit(self, prompt, sampling):
        self.left[len(self.submitted)] = sampling.max_tokens
        self.submitted.append(self.clock.now - 100.0)
        return len(self.submitted) - 1

    def step(self):
        self.clock.now += 1.0
        chunks = []
        for index in list(self.left)[:2]:
            self.left[index] -= 1
            output = None if self.left[index] else types.SimpleNamespace(error=None)
            chunks.append(types.SimpleNamespace(index=index, tokens=[0], output=output))
            if output:
                del self.left[index]
        return chunks


@pytest.mark.parametrize(
    ("max_batch", "at_once", "submitted", "times"),
    [
        # The first finds nobody else; at 5 two of three that wait fit, and the third waits for both.
        (2, None, [2.0, 5.0, 5.0, 7.0, 20.0], [[3.0, 4.0, 5.0], [6.0], [6.0, 7.0], [8.0], [21.0]]),
        (None, None, [2.0, 3.0, 3.0, 4.0, 20.0], [[3.0, 4.0, 5.0], [4.0], [5.0, 6.0], [6.0], [21.0]]),
        (None, 1, [2.0, 5.0, 6.0, 8.0, 20.0], [[3.0, 4.0, 5.0], [6.0], [7.0, 8.0], [9.0], [21.0]]),
    ],
)
def test_static_batches_wait_and_an_engine_takes_what_arrives(max_batch, at_once, submitted, times):
    clock = Clock()
    engine = PretendedEngine(clock)
    jobs = [Job(at, (1, 2), tokens) for at, tokens in [(2.0, 3), (2.5, 1), (3.0, 2), (3.5, 1), (20.0, 1)]]
    served = served_by(lambda jobs: on_engine(engine, jobs, max_batch, clock, clock.sleep, at_once), jobs)
    assert engine.submitted == submitted
    assert [list(each.times) for each in served] == times
    assert [each.ttft for each in served] == [t[0] - job.arrival for t, job in zip(times, jobs, strict=True)]


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
    jobs = [Job(1.0, (1,), 2), Job(2.0, (1,), 2)]
    with pytest.raises(RuntimeError, match=told):
        served_by(lambda jobs: iter(results), jobs)


def test_nothing_is_compiled_while_the_clock_runs():
    model = full_attention(eos_token_ids=tuple(range(509)))  # every token would end a request
    jobs = make_jobs([TraceRequest(0.0, *sizes) for sizes in [(90, 30), (70, 12), (20, 1), (90, 5)]], 509, 0)
    with rl.Engine(model, 2, max_length=128, prefill_tokens=32) as engine, counted_compilations() as compilations:
        engine.warm_up(sampling=[GREEDY])
        warm = compilations()
        served = served_by(lambda jobs: on_engine(engine, jobs), jobs)
        assert 0 < warm == compilations()
        assert [len(each.times) for each in served] == [30, 12, 1, 5]
        jax.jit(lambda x: x + 3)(1)
        assert compilations() == warm + 1
    jax.jit(lambda x: x + 4)(1)
    assert compilations() == warm + 1  # no longer counted


# --- the command ---


def test_a_replay_with_the_bundled_model(run, write, capsys):
    file = write(HEAD + "0,100,2\n0.01,60,4\n0.02,5000,6\n9,9,9\n")
    arguments = ("--trace", file, "--requests", 3, "--scale-lengths", 0.5, "--max-batch", 2, "--prefill-tokens", 32)
    stored = run(*arguments, "--speed", "2,4", "--ttft-limit", 1000, "--tpot-limit", 1000)
    assert stored["benchmark"] == "replay"
    assert (stored["model"]["name"], stored["model"]["dtype"]) == ("bundled", "bfloat16")
    assert stored["server"] == {"max_batch": 2, "prefill_tokens": 32, "prefix_caching": True}
    trace = stored["trace"]
    assert (trace["source"], trace["requests"], trace["clamped"]) == ("trace.csv", 3, 1)
    assert trace["requests_per_s"] == pytest.approx(1 / 0.01)
    assert trace["prompt_tokens"]["p50"] == 50
    runs = [(each["server"], each["speed"], each["cache_tokens"]) for each in stored["runs"]]
    assert runs == [("static", 2, 2048), ("engine", 2, 2048), ("static", 4, 2048), ("engine", 4, 2048)]
    for each in stored["runs"]:
        result = each["result"]
        assert each["compiled_while_serving"] == 0
        assert result["completed"] == 3
        assert result["good_share"] == 1.0
        tokens = 1 + 2 + 3
        assert result["output_throughput"] == pytest.approx(tokens / result["duration"])
        assert 0 < result["median_ttft_ms"] <= result["median_e2el_ms"] <= 1e3 * result["duration"]
    assert "hardware" in stored
    assert str(file.parent) not in json.dumps(stored)
    tables = capsys.readouterr().out
    assert tables.count("static engine, 2,048") == 2
    assert "Request goodput (req/s)" in tables


def test_conversations_are_saved_and_replayed_over_pools(run, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "conversations.jsonl", tmp_path / "hits.png"
    assert main(["bench", "replay", "--conversations", "--requests", "8", "--save-trace", str(file)]) == 0
    assert read_trace(file) == generate_conversations(8, 0, Conversations())
    assert "8 requests are in" in capsys.readouterr().out
    sizes = ("--scale-lengths", 0.1, "--speed", 50, "--max-batch", 1, "--prefill-tokens", 16)
    pools = ("--server", "engine", "--cache-tokens", "512,4096", "--plot", picture)
    stored = run(*TINY.split(), "--trace", file, *sizes, *pools)
    small, large = stored["runs"]
    assert (small["cache_tokens"], large["cache_tokens"]) == (512, 4096)
    assert small["prefix_hit_rate"] <= large["prefix_hit_rate"] == stored["trace"]["prefix_hit_rate"]
    assert large["prefix_hit_rate"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_fit_program_prints_trace_and_generator(capsys, write):
    trace = generate_trace(600, 0, CONVERSATION)
    file = write(HEAD + "".join(f"{r.arrival},{r.prompt_tokens},{r.output_tokens}\n" for r in trace))
    assert main(["bench", "replay", "--fit", str(file)]) == 0
    printed = capsys.readouterr().out
    median = np.median([request.output_tokens for request in trace])
    assert len(re.findall(rf" output tokens, median +{median:.4g} ", printed)) == 2
    assert "generator fitted to this trace: 600 requests" in printed
    assert "generator as it ships: 600 requests" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--requests", "0"], "'0' is not a positive integer"),
        (["--speed", "1,nan"], "'nan' is not a positive number"),
        (["--trace", "absent.csv"], "absent.csv"),
        (["--trace", "absent.csv", "--rate", "2"], "change a trace's with --speed"),
        (["--trace", "absent.csv", "--conversations"], "--conversations is for generated requests"),
        (["--save-trace", "trace.csv"], "end it in .jsonl"),
        (["--cache-tokens", "4096,100"], "--cache-tokens is 100, in pages of 64, and the longest request takes"),
        (["no-such-directory"], "no-such-directory"),
        (["bundled", "--layers", "2"], "has weights of its own"),
    ],
)
def test_bad_usage_is_told_before_any_work(capsys, arguments, told):
    assert main(["bench", "replay", *arguments]) == (1 if told == "absent.csv" else 2)  # a file is no argument
    assert told in capsys.readouterr().err


def test_a_plot_has_a_panel_for_whatever_was_varied(monkeypatch, tmp_path):
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, file, **_: drawn.append(self))
    result = {"request_goodput": 2.0}
    one = a_run(result, server="static", cache_tokens=1024)
    limits = {"ttft": 0.15, "tpot": 0.05}
    report = {"trace": {"prefix_hit_rate": 0.5}, "limits": limits, "runs": [one]}
    replay.plot(report, tmp_path / "plot.png")
    ttft, tpot = drawn[0].axes
    assert [line.get_xdata()[-1] for line in ttft.lines] == [200.0, 150.0]  # the longest, the limit
    assert [line.get_xdata()[-1] for line in tpot.lines] == [pytest.approx(200.0), 50.0]
    report["runs"] += [a_run(result, cache_tokens=tokens, speed=s) for s in (1.0, 2.0) for tokens in (1024, 512)]
    replay.plot(report, tmp_path / "plot.png")
    _, _, goodput, hits = drawn[1].axes
    assert [list(line.get_xdata()) for line in goodput.lines] == [[1.0], [1.0, 2.0]]
    assert [list(line.get_xdata()) for line in hits.lines[:2]] == [[512, 1024]] * 2
    assert list(hits.lines[2].get_ydata()) == [0.5, 0.5]
