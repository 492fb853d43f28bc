"""`load_model` and `generate`, cache and all, against transformers' 32 greedy tokens of every fixture."""

import pathlib

import numpy as np
import pytest

import ridgeline as rl

FIXTURES = pathlib.Path(__file__).parent / "fixtures" / "parity"
CASES = sorted(FIXTURES.glob("*/*.npz"))


@pytest.mark.parametrize("file", CASES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_greedy_tokens_are_those_of_transformers(file):
    expected = np.load(file)
    model = rl.load_model(file.parent, dtype="float32")
    params = rl.SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)
    outputs = rl.generate(model, expected["prompts"].tolist(), params)
    assert [output.tokens for output in outputs] == expected["generated"].tolist()


def test_there_are_cases():
    assert len(CASES) >= 19
