"""`ridgeline convert`, what it writes, and what is said of a conversion that is damaged, edited or cut short."""

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ridgeline as rl
from checkpoints import FIXTURES, LLAMA, PHI3, assert_same, random_tensors, refused, save
from ridgeline.cli import main
from ridgeline.model.checkpoint import load, orbax, writing
from ridgeline.model.loading import convert_model, load_model


@pytest.fixture
def hf(tmp_path) -> Path:
    directory = tmp_path / "hf"
    directory.mkdir()
    save(directory, PHI3 | {"torch_dtype": "bfloat16"}, random_tensors(PHI3, "bfloat16"))
    return directory


@pytest.fixture
def converted(hf) -> Path:
    return convert_model(hf, hf.parent / "out")


def edit(file: Path, **changes) -> None:
    """Change fields of a JSON file; those of a nested object by `object__field`."""
    text = json.loads(file.read_text())
    for name, value in changes.items():
        *outer, last = name.split("__")
        target = text
        for part in outer:
            target = target[part]
        target[last] = value
    file.write_text(json.dumps(text))


# --- what is written, and loaded again ---


@pytest.mark.parametrize("name", sorted(path.name for path in FIXTURES.iterdir()))
def test_conversions_load_as_the_original_does(tmp_path, name):
    model = load_model(FIXTURES / name)
    again = load_model(convert_model(FIXTURES / name, tmp_path / "deep" / "out"))
    assert again.config == model.config
    assert (again.generation, again.name) == (model.generation, "out")
    assert jax.tree.structure(again.params) == jax.tree.structure(model.params)
    assert_same(again.params, model.params)


def test_the_bundled_model_with_its_tokenizer(tmp_path):
    model, again = load_model("bundled"), load_model(convert_model("bundled", tmp_path / "out"))
    assert_same(again.params, model.params)
    assert again.generation == model.generation
    messages = [{"role": "user", "content": "Tell me of the king"}]
    assert again.tokenizer.apply_chat_template(messages) == model.tokenizer.apply_chat_template(messages)
    greedy = rl.SamplingParams(max_tokens=6, temperature=0.0)
    assert rl.generate(again, ["Once"], greedy)[0].tokens == rl.generate(model, ["Once"], greedy)[0].tokens


def test_every_file_that_loading_reads_is_taken_over(hf):
    texts = dict.fromkeys(writing.BESIDE[:-1], "{}") | {"config.json": (hf / "config.json").read_text()}
    texts |= {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}', "merges.txt": "#version: 0.2"}
    texts.pop("tokenizer.json")
    for name, text in texts.items():
        (hf / name).write_text(text)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool.jinja").write_text("x")
    (hf / "README.md").write_text("x")
    out = convert_model(hf, hf.parent / "out")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*texts, "additional_chat_templates", "params", "ridgeline.json"]
    )
    assert (out / "additional_chat_templates" / "tool.jinja").read_text() == "x"


def test_relative_paths(hf, monkeypatch):
    monkeypatch.chdir(hf.parent)
    model = load_model(convert_model("hf", "out"))
    assert_same(model.params, load_model("hf").params)
    again = load_model("out")
    assert_same(again.params, model.params)
    assert again.directory == Path("out")


def test_command(hf, capsys):
    out = hf.parent / "out"
    assert main(["convert", str(hf), str(out), "--dtype", "float32"]) == 0
    printed = capsys.readouterr()
    assert re.fullmatch(rf"{out}: [\d.e-]+ GB in [\d.]+ s, [\d.e-]+ GB/s\n", printed.out)
    model = load_model(out)
    assert model.config.dtype == "float32"
    assert_same(model.params, load_model(hf, dtype="float32").params)
    description = json.loads((out / "ridgeline.json").read_text())
    assert (description["format"], description["config"]["vocab_size"]) == (4, 29)
    assert re.match(r"\d+\.\d+\.\d+", description["ridgeline"])
    assert main(["convert", str(hf), str(out)]) == 1
    assert "out exists already; give another directory, or remove it first" in capsys.readouterr().err
    assert main(["convert", str(out), str(hf.parent / "second")]) == 1
    assert "out is a converted checkpoint already; give the original" in capsys.readouterr().err
    assert not (hf.parent / "second").exists()


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_dtype_at_loading(tmp_path, asked):
    tensors = {
        name: np.random.default_rng(1).normal(size=t.shape).astype("f") for name, t in random_tensors(LLAMA).items()
    }
    (tmp_path / "hf").mkdir()
    save(tmp_path / "hf", LLAMA, tensors)
    model = load_model(convert_model(tmp_path / "hf", tmp_path / "out"), dtype=asked)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model.params)} == {asked} == {model.config.dtype}
    assert_same(model.params, load_model(tmp_path / "hf", dtype=asked).params)


def test_float16_is_left_to_the_conversion(hf, converted):
    with pytest.raises(rl.CheckpointError, match=r"out holds bfloat16, which may not fit float16; .* --dtype float16"):
        load_model(converted, dtype="float16")
    half = load_model(convert_model(hf, hf.parent / "half", dtype=jnp.float16))
    assert half.config.dtype == "float16"
    assert_same(half.params, load_model(hf, dtype="float16").params)


def test_an_unknown_dtype_is_told_first(hf):
    with pytest.raises(ValueError, match="dtype 'int8' is not supported"):
        convert_model(hf, hf.parent / "out", dtype="int8")


# --- edited and damaged ---


def test_newer_and_broken_formats(converted):
    file = converted / "ridgeline.json"
    edit(file, format=5, ridgeline="9.1.0")
    refused(converted, r"ridgeline\.json is of format 5, written by Ridgeline 9\.1\.0; this is .* up to 4: upgrade it")
    edit(file, format="one")
    refused(converted, r"ridgeline\.json: format is 'one', expected a whole number")
    file.write_text("{")
    refused(converted, r"ridgeline\.json is not JSON")
    file.write_text('{"format": 2, "config": {"vocab_size": 3}}')
    refused(converted, r"ridgeline\.json, written by Ridgeline of unknown version, holds a config that is not valid")
    edit(file, config__layers=3)
    refused(converted, "holds a config that is not valid here")


def test_fields_of_another_type(converted):
    edit(converted / "ridgeline.json", config__tie_embeddings="false")
    refused(converted, r"ridgeline\.json: config\.tie_embeddings is 'false', expected true or false")


def test_fields_of_a_later_version(converted):
    edit(converted / "ridgeline.json", config__memory_layers=8)
    refused(converted, r"holds a config that is not valid here \(.*memory_layers.*\); convert the checkpoint again")


@pytest.mark.parametrize(
    ("file", "changes", "pattern"),
    [
        (
            "ridgeline.json",
            {"config__norm_eps": 1e-3},
            r"disagree about norm_eps \(0\.001 against 1e-05\): one of them",
        ),
        ("config.json", {"rope_theta": 5e5}, r"ridgeline\.json and config\.json beside it disagree about layers: one"),
        ("config.json", {"num_hidden_layers": 3}, "disagree about layers"),
        ("config.json", {"vocab_size": 31}, r"disagree about vocab_size \(29 against 31\)"),
    ],
)
def test_one_configuration_edited(converted, file, changes, pattern):
    edit(converted / file, **changes)
    refused(converted, pattern)


@pytest.mark.parametrize(
    ("hf_changes", "changes", "pattern"),
    [
        (
            {"vocab_size": 31},
            {"vocab_size": 31},
            r"'embedding' as bfloat16 \[29, 24\], expected bfloat16 \[31, 24\] by",
        ),
        ({"tie_word_embeddings": True}, {"tie_embeddings": True}, "params have besides unembedding, by the config"),
        (
            {},
            {"dtype": "float32"},
            r"params holds '.*' as bfloat16 .*, expected float32 .* convert the checkpoint again",
        ),
    ],
)
def test_both_configurations_edited_contradict_the_arrays(converted, hf_changes, changes, pattern):
    edit(converted / "config.json", **hf_changes)
    edit(converted / "ridgeline.json", **{f"config__{name}": value for name, value in changes.items()})
    refused(converted, pattern)


def test_more_layers_than_were_stored(converted):
    edit(converted / "config.json", num_hidden_layers=3)
    layers = json.loads((converted / "ridgeline.json").read_text())["config"]["layers"]
    edit(converted / "ridgeline.json", config__layers=layers * 2)
    edit(converted / "config.json", num_hidden_layers=4)
    refused(converted, r"params lack layers\.2\.attn_norm, .* and \d+ more, by the config in ridgeline\.json")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # orbax drops reads that fail alongside
def test_arrays_that_are_gone_or_damaged(hf, converted):
    """Every file in turn taken away, then cut in half: what still loads is what was stored, file by file."""
    whole = load_model(hf).params
    told = 0
    for file in sorted(path for path in (converted / "params").rglob("*") if path.is_file()):
        data = file.read_bytes()
        for damaged in (None, data[: len(data) // 2]):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            try:
                assert_same(load_model(converted).params, whole)
            except rl.CheckpointError as error:
                assert re.search(r"params cannot be read \(.+\); convert the checkpoint again", str(error))  # noqa: PT017
                told += 1
            file.write_bytes(data)
    gc.collect()  # so that the reads which orbax dropped are told of here, and not in the next test
    assert told >= 10  # orbax leaves files behind that nothing reads
    shutil.rmtree(converted / "params")
    refused(converted, r"params cannot be read \(.+\); convert the checkpoint again \(ridgeline convert\)")


# --- cut short ---


def test_what_fails_leaves_nothing(hf, monkeypatch):
    monkeypatch.setattr(orbax, "write_description", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        convert_model(hf, hf.parent / "out")
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_ctrl_c_leaves_nothing_and_is_no_success(hf, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(orbax, "read_parameter", interrupted)
    assert main(["convert", str(hf), str(hf.parent / "out")]) == 130
    assert capsys.readouterr().err == "ridgeline: interrupted\n"
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_bad_checkpoints_are_refused_before_anything_is_written(hf, capsys):
    (hf / "generation_config.json").write_text('{"top_p": 2}')
    assert main(["convert", str(hf), str(hf.parent / "out")]) == 1
    assert "top_p is 2, expected a number above 0 up to 1" in capsys.readouterr().err
    (hf / "generation_config.json").unlink()
    edit(hf / "config.json", vocab_size=31)
    assert main(["convert", str(hf), str(hf.parent / "out")]) == 1
    assert "expected [31, 24] by config.json" in capsys.readouterr().err
    assert [path.name for path in hf.parent.iterdir()] == ["hf"]


def test_killed_conversions_leave_nothing_that_loads(tmp_path):
    """Real processes, each killed once it has written a certain part of the files of a whole conversion."""
    deep = LLAMA | {"num_hidden_layers": 12, "attention_bias": False}
    (tmp_path / "hf").mkdir()
    save(tmp_path / "hf", deep, random_tensors(deep))
    out, partial = tmp_path / "out", tmp_path / "out.incomplete"
    whole = load_model(tmp_path / "hf").params
    assert_same(load_model(convert_model(tmp_path / "hf", out)).params, whole)
    files = sum(1 for path in out.rglob("*") if path.is_file())
    shutil.rmtree(out)

    half_way = 0
    for part in (0.0, 0.0, 0.1, 0.3, 0.6, 0.9):
        process = subprocess.Popen(
            [sys.executable, "-m", "ridgeline", "convert", str(tmp_path / "hf"), str(out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (partial.exists() and file_count(partial) >= part * files):
            time.sleep(0.001)
        process.kill()
        if process.wait(timeout=120) == 0:  # it ended before the signal came: whole, then
            assert_same(load_model(out).params, whole)
            shutil.rmtree(out)
            continue
        assert process.returncode == -signal.SIGKILL
        half_way += 1
        refused(out, "no such directory: .*out;")
        refused(partial, r"out\.incomplete is a conversion that was cut short, or is still running: its name ends in")
        with pytest.raises(
            rl.CheckpointError, match=r"out\.incomplete exists: a conversion to .*out was killed, or is"
        ):
            convert_model(tmp_path / "hf", out)
        partial.rename(tmp_path / "renamed")
        if part > 0:
            refused(tmp_path / "renamed", "renamed is a conversion that was cut short, .* it has no ridgeline.json")
        else:
            refused(tmp_path / "renamed", "renamed (is a conversion that was cut short|has no config.json)")
        shutil.rmtree(tmp_path / "renamed")
    assert half_way >= 5
    assert_same(load_model(convert_model(tmp_path / "hf", out)).params, whole)


def file_count(directory: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(directory))


def test_a_conversion_holds_few_parameters_at_once(hf, monkeypatch):
    """No more bytes are read before they are written than the largest parameter has."""
    from orbax.checkpoint import v1

    sizes, original = [], v1.partial.save
    monkeypatch.setattr(
        v1.partial,
        "save",
        lambda path, batch: sizes.append(sum(a.nbytes for a in batch.values())) or original(path, batch),
    )
    model = load_model(convert_model(hf, hf.parent / "out"))
    specs = jax.tree.leaves(rl.param_specs(model.config))
    assert sum(sizes) == sum(spec.nbytes for spec in specs)
    assert max(sizes) == max(spec.nbytes for spec in specs)
    assert load.THREADS > 1
