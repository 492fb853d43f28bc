"""Every family against transformers: committed fixtures, and live where torch and transformers are installed.

`python tests/fixtures/make_parity.py --check` prints the table of differences.
"""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

import ridgeline as rl

_SCRIPT = pathlib.Path(__file__).parent / "fixtures" / "make_parity.py"


def _import_script():
    spec = importlib.util.spec_from_file_location("make_parity", _SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


parity = _import_script()
EXPECTED = [(name, file) for name, case in parity.CASES.items() for file in case.prompts]


def _fixture(name, file="expected"):
    config, params = parity.load(parity.ROOT / name)
    return config, params, dict(np.load(parity.ROOT / name / f"{file}.npz"))


@pytest.mark.parametrize(("name", "file"), EXPECTED)
def test_fixture(name, file):
    config, params, expected = _fixture(name, file)
    windows = [layer.window for layer in config.layers if layer.window is not None]
    if file == "expected":
        assert expected["prompts"].shape[1] > 2 * max(windows, default=0)
    worst, equal = parity.difference(params, config, expected)
    print(f"{name}/{file}: max abs logit difference {worst:.2e}, greedy {'equal' if equal else 'differs'}")
    assert worst < parity.TOLERANCE
    assert equal


@pytest.mark.parametrize("name", parity.CASES)
def test_fixture_notices_every_parameter(name):
    config, params, expected = _fixture(name)
    leaves, treedef = jax.tree.flatten(params)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    rng = np.random.default_rng(0)
    for index, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
        share = 1.0 if "selection_bias" in path else 0.1  # which counts only where it selects another expert
        noise = share * leaf.std() * rng.standard_normal(leaf.shape).astype(leaf.dtype)
        changed = treedef.unflatten([*leaves[:index], leaf + noise, *leaves[index + 1 :]])
        assert parity.difference(changed, config, expected)[0] > 5 * parity.TOLERANCE, path


def _each_layer(config, change):
    return config.replace(layers=tuple(change(layer) for layer in config.layers))


def _each_rope(config, **changes):
    return _each_layer(
        config, lambda layer: dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, **changes))
    )


def _wider(config):
    return _each_layer(
        config, lambda layer: dataclasses.replace(layer, window=None if layer.window is None else layer.window + 1)
    )


def _same_window(config):
    return _each_layer(config, lambda layer: dataclasses.replace(layer, window=None))


def _experts(config, **changes):
    return config.replace(experts=dataclasses.replace(config.experts, **changes))


MISREADINGS = [
    ("llama3", lambda config: _each_rope(config, kind="default")),
    ("llama3", lambda config: _each_rope(config, low_freq_factor=2.0)),
    ("llama_linear", lambda config: _each_rope(config, kind="default")),
    ("llama_dynamic", lambda config: _each_rope(config, kind="default")),
    ("llama_yarn", lambda config: _each_rope(config, attention_factor=1.0)),
    ("llama_yarn", lambda config: _each_rope(config, truncate=False)),
    ("mistral", _wider),
    ("mistral", lambda config: _each_rope(config, theta=11_000.0)),
    ("qwen2_window", _wider),
    ("qwen2_window", _same_window),
    ("gemma2", _wider),
    ("gemma2", lambda config: config.replace(attn_soft_cap=None)),
    ("gemma2", lambda config: config.replace(logit_soft_cap=None)),
    ("gemma2", lambda config: config.replace(activation="gelu")),
    ("gemma2", lambda config: config.replace(query_scale=config.head_dim**-0.5)),
    ("gemma3", _wider),
    ("gemma3", lambda config: config.replace(layers=config.layers[::-1])),
    ("gemma3", lambda config: _each_rope(config, kind="default")),
    ("phi3", _wider),
    ("phi3_longrope", lambda config: _each_rope(config, attention_factor=1.0)),
    ("phi3_longrope", lambda config: _each_rope(config, long_factor=config.layers[0].rope.short_factor)),
    ("phi3_partial", lambda config: _each_rope(config, rotary_dim=10)),
    ("olmo2", lambda config: config.replace(norm_eps=1e-2)),
    ("qwen2_moe", lambda config: _experts(config, renormalize=True)),
    ("qwen3_moe", lambda config: _experts(config, per_token=2)),
    ("gpt_oss", lambda config: _experts(config, swiglu_limit=7.0)),
    ("gpt_oss", lambda config: config.replace(layers=config.layers[::-1])),
    ("glm4_moe", lambda config: _experts(config, groups_per_token=3)),
    ("glm4_moe", lambda config: _experts(config, scores="softmax")),
]


@pytest.mark.parametrize(("name", "misread"), MISREADINGS)
def test_fixture_notices_a_misread_config(name, misread):
    config, params, expected = _fixture(name)
    assert parity.difference(params, misread(config), expected)[0] > 3 * parity.TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        *("llama3", "llama_bias", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3_longrope", "olmo2"),
        *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "glm4_moe"),
    ],
)
def test_live(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    parity.make(name, tmp_path, seed=1000)
    config, params = parity.load(tmp_path)
    for file in parity.CASES[name].prompts:
        worst, equal = parity.difference(params, config, np.load(tmp_path / f"{file}.npz"))
        print(f"{name}/{file}, live: max abs logit difference {worst:.2e}, greedy {'equal' if equal else 'differs'}")
        assert worst < parity.TOLERANCE
        assert equal


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "glm4_moe"])
def test_live_with_routers_that_are_sure_of_themselves(name, tmp_path, monkeypatch):
    """The best expert of a token has nearly all of it, and one expert always the same logit."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    build = parity.build

    def sure(name, seed):
        model = build(name, seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith(("mlp.gate.weight", "mlp.router.weight")):
                    parameter *= 20
                    parameter[0] = 0
        return model

    monkeypatch.setattr(parity, "build", sure)
    parity.make(name, tmp_path, seed=1000)
    config, params = parity.load(tmp_path)
    worst, equal = parity.difference(params, config, np.load(tmp_path / "expected.npz"))
    assert worst < parity.TOLERANCE
    assert equal


def test_fixtures_are_small():
    assert sum(path.stat().st_size for path in parity.ROOT.rglob("*") if path.is_file()) < 5.6e6


def test_bfloat16_stays_close():
    config, params, expected = _fixture("llama3")
    logits = rl.forward(
        jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params),
        config.replace(dtype="bfloat16"),
        expected["prompts"],
    )
    assert logits.dtype == np.float32
    reference = expected["logits"]
    found = np.asarray(logits)[:, expected["positions"]]
    assert np.abs(found - reference).max() < 0.1 * np.abs(reference).max()
    assert np.corrcoef(found.ravel(), reference.ravel())[0, 1] > 0.99
