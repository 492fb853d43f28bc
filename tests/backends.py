"""Small tokenizers of three makes."""

import json

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The quick brown fox jumps over the lazy dog. Once upon a time, there was a fox.",
    "don't  stop:   three spaces, a tab\t and\n\nnew lines  ",
    " leading space, and a trailing one ",
    "👩‍👩‍👧‍👦 family, 🇨🇭 flag, 👍🏽 thumbs",
    "漢字とかな交じり文、한국어 그리고 中文。",
    "e\u0301 combining, Ç̃̂ more, ﷽, नमस्ते, สวัสดี",
    "mixed 漢 a 🙂b\u200dc \ufffd a real replacement character, and 🙂🙂🙂",
    "",
]


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS[:3] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def metaspace() -> Backend:
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def llama2_like() -> Backend:
    """Sentencepiece BPE with byte fallback, as Llama 2 and Gemma have it: a space is prepended, and stripped again."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "f"), ("o", "x"), ("▁f", "ox")]
    vocab = {piece: index for index, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


BACKENDS = {"byte-level": byte_level, "metaspace": metaspace, "byte-fallback": llama2_like}


def save(directory, backend: Backend, config: dict | None = None, **files):
    backend.save(str(directory / "tokenizer.json"))
    if config is not None:
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value))
    return directory
