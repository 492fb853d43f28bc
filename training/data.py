"""From a plain text file of books to training windows and held-out windows.

Books are parted by a line `<|story|>`, paragraphs by an empty line. 3 % of each book is held out, as up to three
contiguous stretches cut at paragraph boundaries and spread evenly over the book, so that beginnings, middles and ends
all count. A document is a chapter or tale: what stands between two headings, or between a heading and a held-out
stretch.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BEGIN, END = "<|begin|>", "<|end|>"  # the special tokens, ids 0 and 1
BEGIN_ID, END_ID = 0, 1
PARAGRAPH_BREAK = "\n\n"
BOOK_SEPARATOR = "<|story|>"
HELD_OUT_SHARE = 0.03

# Words with their leading space, contractions, numbers, punctuation runs, and newlines on their own, so that a
# paragraph break is one token whatever punctuation comes before it.
_WORDS = r"'(?:s|t|re|ve|m|ll|d)(?!\p{L})| ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\n+|\s+(?!\S)|\s+"
_NUMBERED_HEADING = re.compile(r"(chapter|part|book)\b|[ivxl]+(\.|$| - )|\d+ ?[.-] ", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Document:
    """A chapter or tale.

    Attributes:
      text: its paragraphs, joined by empty lines.
      ends: whether the story ends there (False where a held-out stretch cuts it).
    """

    text: str
    ends: bool


@dataclasses.dataclass(frozen=True)
class Windows:
    """Rows to score: `targets[b, t]` follows `tokens[b, : t + 1]`, and counts where `weights[b, t]` is 1."""

    tokens: np.ndarray  # [N, T] int32
    targets: np.ndarray  # [N, T] int32
    weights: np.ndarray  # [N, T] float32


def read_books(path: Path) -> list[list[str]]:
    """The paragraphs of every book, without trailing blanks or surplus empty lines."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SystemExit(f"the text {path} does not exist; --text names a plain UTF-8 file of books") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"the text {path} cannot be read as UTF-8: {error}") from None
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))
    books = [re.split(r"\n{2,}", book.strip()) for book in text.split(BOOK_SEPARATOR)]
    books = [[paragraph.strip("\n") for paragraph in book] for book in books if book != [""]]
    if not books:
        raise SystemExit(f"the text {path} holds no words")
    return books


def split_book(paragraphs: Sequence[str], share: float = HELD_OUT_SHARE) -> tuple[list[Document], list[str]]:
    """Part a book into training documents and held-out stretches.

    Args:
      paragraphs: the book.
      share: of its characters to hold out, in up to three stretches (one for a book under 100,000 characters).

    Returns:
      The documents, and the text of each held-out stretch, in reading order.
    """
    lengths = np.array([len(p) + len(PARAGRAPH_BREAK) for p in paragraphs])
    ends = np.cumsum(lengths)
    count = 3 if ends[-1] >= 100_000 else 1
    held_out = np.zeros(len(paragraphs), bool)
    stretches = []
    for index in range(count):
        middle, half = ends[-1] * (2 * index + 1) / (2 * count), ends[-1] * share / count / 2
        inside = (ends - lengths / 2 >= middle - half) & (ends - lengths / 2 < middle + half) & ~held_out
        if inside.any():
            held_out |= inside
            stretches.append(PARAGRAPH_BREAK.join(p for p, taken in zip(paragraphs, inside, strict=True) if taken))
    documents: list[Document] = []
    current: list[str] = []
    for index, paragraph in enumerate(paragraphs):
        starts_story = _is_heading(paragraphs, index)
        if current and (held_out[index] or starts_story):
            documents.append(Document(PARAGRAPH_BREAK.join(current), ends=starts_story))
            current = []
        if not held_out[index]:
            current.append(paragraph)
    if current:
        documents.append(Document(PARAGRAPH_BREAK.join(current), ends=True))
    return documents, stretches


def _is_heading(paragraphs: Sequence[str], index: int) -> bool:
    """A short line that is numbered, or in capitals with prose after it."""
    line = paragraphs[index]
    if "\n" in line or len(line) > 70:
        return False
    if _NUMBERED_HEADING.match(line) and line[-1] not in ",;!?\"'":
        return True
    followed = index + 1 < len(paragraphs) and len(paragraphs[index + 1]) > 80
    return line.isupper() and len(line) > 5 and followed


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer that puts the begin token in front of whatever it encodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(
            f"the text gives a vocabulary of {tokenizer.get_vocab_size()} tokens, not {vocab_size}; "
            "set --vocab-size to at most that (and at least 258), or bring a longer text"
        )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN}:1 $B:1", special_tokens=[(BEGIN, BEGIN_ID), (END, END_ID)]
    )
    return tokenizer


def token_stream(tokenizer: Tokenizer, documents: Sequence[Document]) -> np.ndarray:
    """All documents in a row, [S] int32: begin token, text, and the end token where the story ends."""
    parts = []
    for document, encoding in zip(documents, tokenizer.encode_batch([d.text for d in documents]), strict=True):
        parts.append(np.array(encoding.ids + [END_ID] * document.ends, np.int32))
    return np.concatenate(parts)


class Epochs:
    """Training batches. An epoch reads the whole stream once, cut at an offset of its own, in an order of its own.

    Four windows in five are moved back to the start of their paragraph and get the begin token, so that a begin token
    and the opening of a sentence is what the model knows best; the others begin in mid-sentence. One batch in four
    has rows of the full length, the others have twice as many rows of half the length, which cost less attention.
    """

    def __init__(self, stream: np.ndarray, tokenizer: Tokenizer, length: int, batch_size: int, seed: int):
        """Cut `stream` into batches of `batch_size` rows of `length` tokens (or the same tokens in half rows)."""
        self.stream, self.length, self.batch_size, self.seed = stream, length, batch_size, seed
        self.steps = (len(stream) - 2 * length) // (length * batch_size)
        if self.steps < 1:
            raise SystemExit(
                f"the text gives {len(stream)} training tokens, too few for one batch of {batch_size} x {length}; "
                "lower --batch-size or --length"
            )
        breaks = [i for token, i in tokenizer.get_vocab().items() if token in ("ĊĊ", BEGIN)]  # "\n\n" in byte letters
        self._opens = np.flatnonzero(np.isin(stream, breaks)) + 1

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets, [B, T] int32 each, of a training step; a function of the seed and the step alone."""
        epoch, index = divmod(step, self.steps)
        rng = np.random.default_rng([self.seed, epoch])
        first = rng.integers(self.length, 2 * self.length)
        rows = rng.permutation(self.steps * self.batch_size)[index * self.batch_size :][: self.batch_size]
        starts, length = first + rows * self.length, self.length
        if index % 4:
            starts, length = np.concatenate([starts, starts + length // 2]), length // 2
        rng = np.random.default_rng([self.seed, epoch, index])
        pairs = [self._window(int(start), length, bool(rng.random() < 0.8)) for start in starts]
        tokens, targets = zip(*pairs, strict=True)
        return np.stack(tokens), np.stack(targets)

    def _window(self, start: int, length: int, at_paragraph: bool) -> tuple[np.ndarray, np.ndarray]:
        if at_paragraph:
            opened = int(self._opens[max(np.searchsorted(self._opens, start, "right") - 1, 0)])
            if start - opened < length:  # a longer paragraph would have this window miss its own stretch
                targets = self.stream[opened : opened + length]
                return np.concatenate([[BEGIN_ID], targets[:-1]]).astype(np.int32), targets
        start = min(start, len(self.stream) - length - 1)
        return self.stream[start : start + length], self.stream[start + 1 : start + length + 1]


def scoring_windows(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Windows:
    """Held-out windows that score every token of every text exactly once.

    A window starts with what came half a window before, so that all but the first tokens of a text are judged with at
    least `length // 2` tokens of context. The begin token is context only.
    """
    rows = []
    half = length // 2
    for encoding in tokenizer.encode_batch(list(texts)):
        ids = np.array(encoding.ids, np.int32)
        for scored in [0, *range(length, len(ids) - 1, half)]:  # index of the first target not scored before
            begin = max(scored - (length - half), 0)
            row = np.zeros((3, length), np.float32)
            tokens, targets = ids[begin:-1][:length], ids[begin + 1 :][:length]
            row[0, : len(tokens)], row[1, : len(targets)] = tokens, targets
            row[2, scored - begin : len(targets)] = 1.0
            rows.append(row)
    stacked = np.stack(rows)
    return Windows(stacked[:, 0].astype(np.int32), stacked[:, 1].astype(np.int32), stacked[:, 2])
