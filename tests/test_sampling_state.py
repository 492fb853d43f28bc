"""Rows of a batch on the device: how requests enter, leave and resume, and which programs that takes."""

import jax
import numpy as np

from ridgeline.decode.sampling.layout import EMPTY, SamplingPlan, make_plan, request_arrays
from ridgeline.decode.sampling.params import SamplingParams
from ridgeline.decode.sampling.state import empty_state, insert, make_sampling_state

V, EOS = 50, (7, 99)
REQUESTS = [
    SamplingParams(repetition_penalty=1.3, presence_penalty=0.5, seed=2**40),
    SamplingParams(logit_bias={3: 1.5, 49: -2.0}, top_k=5, top_p=0.5, min_p=0.1, seed=4),
    SamplingParams(min_tokens=4, stop_token_ids=[1, 2], logprobs=0, temperature=0.3, seed=5),
    SamplingParams(min_tokens=4, suppress_tokens=[8, 7], begin_suppress_tokens=[1, 8, 99]),
    EMPTY,
]
PROMPTS = [list(range(20)), [1, 1], [5, 6, 7], [9], []]


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_rows_enter_in_any_order_and_leave_nothing_behind():
    expected, _ = make_sampling_state(REQUESTS, PROMPTS, [0] * 5, V, EOS)
    state = empty_state(5, V, tables=True)
    empty = jax.tree.map(np.array, state)  # copies, as `insert` consumes what it is given
    for row, request in [(2, 0), (0, 1), (0, 0), (3, 2), (1, 1), (2, 2), (3, 3), (4, 4)]:
        arrays = request_arrays([REQUESTS[request]], [PROMPTS[request]], [0], EOS)
        before = jax.tree.map(lambda x, row=row: np.delete(x, row, axis=0), state)
        state = insert(state, np.array([row], np.int32), arrays)
        assert_equal(jax.tree.map(lambda x, row=row: np.delete(x, row, axis=0), state), before)
    assert_equal(state, expected)
    arrays = request_arrays([EMPTY] * 8, [()] * 8, [0] * 8)
    assert_equal(insert(state, np.arange(8, dtype=np.int32), arrays), empty)  # rows beyond the batch are left out


def test_the_tables_hold_what_was_asked_for():
    state, _ = make_sampling_state(REQUESTS, PROMPTS, [0] * 5, V, EOS)
    assert [np.flatnonzero(row).tolist() for row in state.prompt_mask] == [PROMPTS[0], [], [], [], []]
    never, until = np.iinfo(np.int32).max, np.asarray(state.masked_until)
    assert {(row, token): until[row, token] for row, token in np.argwhere(until)} == {
        **{(2, token): 7 for token in (1, 2, 7)},
        **{(3, 1): 2, (3, 7): never, (3, 8): never},
    }
    assert {(row, token): state.bias[row, token] for row, token in np.argwhere(np.asarray(state.bias))} == {
        (1, 3): 1.5,
        (1, 49): -2.0,
    }
    assert not state.output_counts.any()
    assert state.settings.seeds.tolist() == [[2**8, 0], [0, 4], [0, 5], [0, 0], [0, 0]]


def test_allowed_tokens_are_masked_by_what_masks_others_too():
    params = SamplingParams(min_tokens=4, allowed_token_ids=[7, 30, 31], suppress_tokens=[30], stop_token_ids=[8])
    state, plan = make_sampling_state([params], [[1]], [0], V, EOS)
    never = np.iinfo(np.int32).max
    expected = [{7: 5, 31: 0}.get(token, never) for token in range(V)]
    assert (plan.kind, state.masked_until[0].tolist()) == ("full", expected)


def test_a_resumed_request_remembers_its_output():
    output = [4, 4, 9]
    arrays = request_arrays(REQUESTS[:3], PROMPTS[:3], [0] * 3, EOS, outputs=[output] * 3)
    state = insert(empty_state(3, V, tables=True), np.arange(3, dtype=np.int32), arrays)
    assert state.output_counts[0].tolist() == np.bincount(output, minlength=V).tolist()
    assert not state.output_counts[1].any()  # which nothing reads
    assert state.masked_until[2, 1] == len(PROMPTS[2]) + 4


def test_few_programs_insert_requests_of_any_length():
    state, compiled = empty_state(2, V, tables=True), insert._cache_size()
    for length in [*range(60), 500, 1000, 4000]:
        params = SamplingParams(repetition_penalty=1.1, logit_bias={n: 1.0 for n in range(length % V)})
        arrays = request_arrays([params], [[3] * length], [0])
        state = insert(state, np.array([length % 2], np.int32), arrays)
    assert insert._cache_size() - compiled == 4  # lists of 16, 64, 1,024 and 4,096


def test_a_plan_is_the_coarsest_that_a_request_needs():
    greedy, random, full = (SamplingPlan(kind, width) for kind, width in [("greedy", 0), ("random", 0), ("full", 32)])
    assert make_plan([], V) == make_plan([EMPTY, SamplingParams(temperature=0, top_p=0.5)], V) == greedy
    assert make_plan([EMPTY, SamplingParams()], V) == make_plan([SamplingParams(top_k=3, top_p=0.2)], V) == random
    for params in (*REQUESTS[:4], SamplingParams(min_tokens=1), SamplingParams(begin_suppress_tokens=[3])):
        assert make_plan([EMPTY, params, SamplingParams()], V) == full
    assert make_plan([SamplingParams(temperature=0, logprobs=33)], V) == SamplingPlan("full", V)
