"""Well-known models by name: configurations only, no weights.

Each is the config.json that its authors publish on the Hugging Face Hub, cut to the keys that shape the network, and
read by the family it belongs to. Sources: meta-llama/Llama-2-7b-hf, Llama-3.1-8B, -70B, -405B, Llama-3.2-1B, -3B;
mistralai/Mistral-7B-v0.1, -v0.3; Qwen/Qwen2.5-7B, Qwen3-8B, -32B; google/gemma-2-9b, -27b, gemma-3-1b-it;
microsoft/Phi-3-mini-4k-instruct, Phi-4-mini-instruct; allenai/OLMo-2-1124-7B.
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
