"""Names on the Hugging Face Hub: in the cache of this machine, or downloaded into it."""

import sys
import types

import pytest

from checkpoints import refused, save, save_shards
from ridgeline.model.find import find_config
from ridgeline.model.loading import load_model


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The cache's directory of org/name, empty; the working directory is empty too."""
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as where it is not installed
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "home" / "hub" / "models--org--na--me"


def add_snapshot(repository, commit="abc", write=save):
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    write(snapshot)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    return snapshot


def test_the_snapshot_that_main_names(repository):
    add_snapshot(repository, "old")
    snapshot = add_snapshot(repository, "new", save_shards)
    model = load_model("org/na--me")
    assert (model.directory, model.name) == (snapshot, "na--me")
    assert find_config("org/na--me") == model.config


def test_the_cache_lies_where_the_environment_says(repository, tmp_path, monkeypatch):
    snapshot = add_snapshot(tmp_path / "elsewhere" / repository.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert load_model("org/na--me").directory == snapshot


def test_a_directory_of_that_name_wins(repository, tmp_path):
    add_snapshot(repository)
    here = tmp_path / "here" / "org" / "na--me"
    here.mkdir(parents=True)
    save(here)
    assert load_model("org/na--me").directory.absolute() == here


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors.index.json", "model-00002-of-00003.safetensors"])
def test_half_a_snapshot_is_not_enough(repository, lost):
    (add_snapshot(repository, write=save_shards) / lost).unlink()
    refused("org/na--me", "nor is all of it in the Hugging Face cache, .*home/hub; pip install 'ridgeline\\[hub\\]'")


def test_without_huggingface_hub_the_command_is_said(repository):
    refused("org/na--me", "org/na--me is no directory here, .*, or run: hf download org/na--me")
    with pytest.raises(ValueError, match="'org/na--me' is no directory with"):
        find_config("org/na--me")


def test_a_download(repository, monkeypatch):
    def snapshot_download(name, cache_dir, allow_patterns):
        assert (name, cache_dir) == ("org/na--me", repository.parent)
        assert {"config.json", "tokenizer.json", "model*.safetensors"} <= {*allow_patterns}
        return str(add_snapshot(repository))

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    assert load_model("org/na--me").config == load_model("org/na--me").config  # the second is in the cache


def test_a_download_that_fails(repository, monkeypatch):
    def snapshot_download(*_, **__):
        raise OSError("no route to the Hub\nand more")

    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(snapshot_download=snapshot_download))
    refused("org/na--me", "it cannot be downloaded: no route to the Hub$")
