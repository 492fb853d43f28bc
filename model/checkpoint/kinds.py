"""Directories and files that hold a model in another form: what each is, and what to load instead."""

from pathlib import Path

from ..fields import Fields, text
from .files import CheckpointError, is_there, listing, read_object, read_text

_FOREIGN = {
    "*.gguf": "llama.cpp's GGUF",
    "*.onnx": "ONNX",
    "tf_model*.h5": "TensorFlow's",
    "flax_model*.msgpack": "Flax's",
    "*.nemo": "NeMo's",
    "*.engine": "TensorRT's",
}
"""Files of weights, and whose form they have."""


def other_kind(directory: Path) -> str | None:
    """What a directory without a model in Hugging Face's layout is, and the remedy; None where nothing is known.

    Raises:
      CheckpointError: a JSON file that it is told by is damaged.
    """
    has = {path.name for path in directory.iterdir()}
    if "adapter_config.json" in has:
        return f"{directory} is {adapter(directory)}"
    if "params.json" in has and any(name.startswith("consolidated") for name in has):
        whose = "Meta's" if any(name.endswith(".pth") for name in has) else "Mistral's"
        return (
            f"{directory} holds a model in {whose} own layout (params.json and consolidated files), in which tensors "
            "have other names and orders; take the Hugging Face files of the same repository, config.json, "
            "model*.safetensors with its index, and tokenizer.json"
        )
    for pattern, whose in _FOREIGN.items():
        if files := sorted(path.name for path in directory.glob(pattern)):
            return f"{directory} holds its weights in {listing(files)}, {foreign(whose)}"
    return None


def foreign(whose: str) -> str:
    """What a file of weights is, and the remedy."""
    return f"{whose} form, which is not read; load the safetensors checkpoint that it was made from"


def foreign_file(path: Path) -> str | None:
    """Whose form a file of weights has, by its name."""
    return next((whose for pattern, whose in _FOREIGN.items() if path.match(pattern)), None)


def adapter(directory: Path) -> str:
    """What a directory with an adapter_config.json is, and the remedy."""
    file = directory / "adapter_config.json"
    base = Fields(read_object(file), {"base_model_name_or_path": text}, str(file)).get("base_model_name_or_path")
    return (
        f"an adapter (LoRA) of the model {base!r}, which is not applied here; merge it with peft, "
        f"AutoPeftModelForCausalLM.from_pretrained({str(directory)!r}).merge_and_unload().save_pretrained(out), and "
        "load `out`"
    )


def model_name(directory: Path) -> str:
    """The name of a directory, of a snapshot that of its repository."""
    if directory.parent.name == "snapshots":
        return directory.parent.parent.name.split("--", 2)[-1]
    return directory.name


def snapshot(directory: Path) -> Path:
    """The snapshot in a repository's directory of the Hugging Face cache, "models--org--name"; others as they are.

    Raises:
      CheckpointError: it holds no snapshot, or several and does not say which is `main`; or it is the cache itself.
    """
    repositories = sorted(path.name for path in directory.glob("models--*--*") if path.is_dir())
    if repositories and not is_there(directory / "config.json"):
        raise CheckpointError(
            f"{directory} is a cache of several repositories; give the directory of one: {listing(repositories)}"
        )
    if not (directory / "snapshots").is_dir() or is_there(directory / "config.json"):
        return directory
    main = directory / "refs" / "main"
    commits = sorted(path.name for path in (directory / "snapshots").iterdir() if path.is_dir())
    named = read_text(main).strip() if is_there(main) else None
    if named in commits:
        return directory / "snapshots" / named
    if len(commits) == 1:
        return directory / "snapshots" / commits[0]
    raise CheckpointError(
        f"{directory} is a repository in the Hugging Face cache whose refs/main names "
        f"{'no snapshot' if named is None else repr(named)}; give one of its snapshots: "
        f"{listing(commits) or 'it has none, download it again'}"
    )
