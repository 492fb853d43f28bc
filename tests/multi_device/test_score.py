"""Scores on meshes: contexts and their continuations on each data shard, and the figures of one device."""

import itertools

import numpy as np
import pytest

import ridgeline as rl
from families import write_checkpoint

CONTEXTS = [list(range(n, n + length)) for n, length in enumerate((70, 3, 130, 64, 20))]
CONTINUATIONS = [[[n, 5, 9], [n] * 20, [7]] for n in range(5)]


@pytest.mark.parametrize("kv_dtype", [None, "int8"])
def test_continuations_score_as_on_one_device(tmp_path, kv_dtype):
    directory = write_checkpoint(tmp_path / "checkpoint", "gemma3", 8, 4)
    one, model = rl.load_model(directory), rl.load_model(directory, mesh=rl.make_mesh(data=2, tensor=4))
    expected, found = (rl.score(m, CONTEXTS, CONTINUATIONS, top=3, kv_dtype=kv_dtype) for m in (one, model))
    for ours, theirs in zip(*map(itertools.chain.from_iterable, (found, expected)), strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-4 if kv_dtype is None else 2e-2)
        if kv_dtype is None:
            assert ours.top_ids.tolist() == theirs.top_ids.tolist()
    (evaluation,) = rl.evaluate(model, [CONTEXTS[2]], context=40, against=model).texts
    assert evaluation.comparison.loss == evaluation.loss
    assert evaluation.loss == pytest.approx(rl.evaluate(one, [CONTEXTS[2]], context=40).loss, abs=1e-4)
