"""Well-known models by name: configurations only, no weights.

Each is the config.json that its authors publish on the Hugging Face Hub under the first of its names there, cut to the
keys that shape the network, and read by the family it belongs to.
"""

import json
from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..hf import config_from_hf

PRESETS: dict[str, dict[str, Any]] = {
    file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(Path(__file__).parent.glob("*.json"))
}
"""config.json by name."""

_ON_THE_HUB = {
    "gemma-2-27b": ("google/gemma-2-27b", "google/gemma-2-27b-it"),
    "gemma-2-9b": ("google/gemma-2-9b", "google/gemma-2-9b-it"),
    "glm-4.5-air": ("zai-org/GLM-4.5-Air",),
    "gpt-oss-120b": ("openai/gpt-oss-120b",),
    "gpt-oss-20b": ("openai/gpt-oss-20b",),
    "gemma-3-1b": ("google/gemma-3-1b-it", "google/gemma-3-1b-pt"),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "meta-llama/Llama-2-7b-chat-hf"),
    **{
        f"llama-3.1-{size.lower()}": tuple(
            f"meta-llama/{name}-3.1-{size}{tuning}" for name in ("Llama", "Meta-Llama") for tuning in ("", "-Instruct")
        )
        for size in ("8B", "70B", "405B")
    },
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B-Instruct"),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B-Instruct"),
    "mistral-7b-v0.1": ("mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1"),
    "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    "mixtral-8x22b": ("mistralai/Mixtral-8x22B-v0.1",),
    "mixtral-8x7b": ("mistralai/Mixtral-8x7B-v0.1", "mistralai/Mixtral-8x7B-Instruct-v0.1"),
    "olmo-2-7b": ("allenai/OLMo-2-1124-7B", "allenai/OLMo-2-1124-7B-Instruct"),
    "phi-3-mini-4k": ("microsoft/Phi-3-mini-4k-instruct",),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct",),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B",),
    "qwen3-235b-a22b": ("Qwen/Qwen3-235B-A22B",),
    "qwen3-30b-a3b": ("Qwen/Qwen3-30B-A3B",),
    "qwen3-32b": ("Qwen/Qwen3-32B",),
    "qwen3-8b": ("Qwen/Qwen3-8B",),
}
HUB_NAMES = {name.lower(): preset for preset, names in _ON_THE_HUB.items() for name in names}
"""The preset that has the shape of a model on the Hugging Face Hub, by its name there in lower case."""


def preset(name: str) -> ModelConfig:
    """The configuration of a well-known model, in the dtype its checkpoint is published in.

    Args:
      name: a key of `PRESETS`, such as "llama-3.1-8b".

    Raises:
      ValueError: there is no preset of that name.
    """
    if not isinstance(name, str) or name not in PRESETS:
        raise ValueError(f"preset {name!r} is not known; known: {', '.join(PRESETS)}")
    return config_from_hf(PRESETS[name])
