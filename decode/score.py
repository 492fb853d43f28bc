"""How well a model predicts a text: its loss, teacher-forced through the KV cache, and how near another model's it is.

Weights, activations and cached keys and values are those that generation would read, in whatever numbers they are
stored: a scheme costs here what it costs there.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ..model.loading import Model
from .teacher_forced import TeacherForced

_CHUNK = 256
"""Tokens a row that pass at once, so that the logits of no more than these are ever held."""

_DEFAULT_CONTEXT = 1024


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What a reference predicts for the same tokens, and how near the model comes to it.

    Attributes:
      loss: the reference's, in nats a token.
      agreement: share of the tokens for which both find the same one likeliest.
      divergence: mean KL(reference || model) of the distributions over the vocabulary, in nats a token.
    """

    loss: float
    agreement: float
    divergence: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
      tokens: how many were scored, each once.
      bytes: of UTF-8 that the scored tokens stand for; None of a text given as token ids.
      loss: mean negative log-likelihood, in nats a token.
      context, stride: how the text was cut; see `evaluate`.
      comparison: with another model, where there is one.
    """

    tokens: int
    bytes: int | None
    loss: float
    context: int
    stride: int
    comparison: Comparison | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))

    @property
    def bits_per_byte(self) -> float | None:
        """The summed loss in bits, over `bytes`: comparable between tokenizers, which perplexity is not."""
        return None if self.bytes is None else self.loss * self.tokens / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, int | float | None]:
        """Everything by name, the comparison's figures beside the others and None where there is none."""
        compared = self.comparison
        return {
            "tokens": self.tokens,
            "bytes": self.bytes,
            "context": self.context,
            "stride": self.stride,
            "loss": self.loss,
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "reference_loss": compared and compared.loss,
            "loss_delta": compared and self.loss / compared.loss - 1,
            "top1_agreement": compared and compared.agreement,
            "kl_divergence": compared and compared.divergence,
        }


@jax.transfer_guard("allow")
def evaluate(
    model: Model,
    texts: str | Sequence[str] | Sequence[Sequence[int]],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    kv_dtype: jax.typing.DTypeLike | None = None,
    limit: int | None = None,
    against: Model | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Score every token of every text but the first, which is context only: the BOS, where the tokenizer adds one.

    A long text is cut into windows of `context` tokens, each `stride` after the one before, and a window scores what
    no earlier one has (https://huggingface.co/docs/transformers/perplexity). So the first `context` tokens scored of a
    text have all before them as context, and the others at least context - stride + 1 tokens.

    Args:
      model: as `load_model` returns it.
      texts: a text or several, each scored from its own beginning, or lists of token ids.
      context: tokens a window, at most the model's `max_position`; 1,024 or that by default.
      stride: tokens from one window to the next, 1 to `context`; half of it by default.
      batch_size: windows that run together.
      kv_dtype: of the model's KV cache, as `init_cache` takes it.
      limit: score the first so many tokens alone.
      against: a model with the same tokenizer, on the same devices, such as the unquantized one in float32; its KV
        cache is in its own dtype.
      progress: called after every batch with the tokens scored so far and those to score in all.

    Raises:
      ValueError: a text of fewer than two tokens, text without a tokenizer, token ids outside the vocabulary, a size
        out of range, an unknown `kv_dtype`, or vocabularies that differ; all before any device work.
    """
    models = [model] if against is None else [model, against]
    context, stride = _sizes(models, context, stride, batch_size, limit)
    texts = [texts] if isinstance(texts, str) else list(texts)
    left, nbytes, windows = math.inf if limit is None else limit, 0, []
    for index, text in enumerate(texts):
        ids, size = _encode(model, index, text, left)
        nbytes = None if nbytes is None or size is None else nbytes + size
        windows += [_Window(ids, *places) for places in _cut(len(ids) - 1, context, stride)]
        left -= len(ids) - 1
        if left == 0:
            break
    if not windows:
        raise ValueError("there is no text to score; give at least one")
    total = sum(window.scores for window in windows)
    windows.sort(key=lambda window: len(window.targets))  # rows of a batch end together
    length, rows = len(windows[-1].targets), min(batch_size, len(windows))
    runners = [TeacherForced(m, rows, length, kv) for m, kv in zip(models, (kv_dtype, None), strict=False)]
    rows = runners[0].rows
    done, sums = 0, np.zeros(1 if against is None else 4)
    for first in range(0, len(windows), rows):
        batch = windows[first : first + rows]
        sums += _score(runners, batch, min(length, _CHUNK))
        done += sum(window.scores for window in batch)
        if progress is not None:
            progress(done, total)
    loss, *others = (sums / total).tolist()
    return Evaluation(total, nbytes, loss, context, stride, Comparison(*others) if others else None)


def _sizes(
    models: Sequence[Model], context: int | None, stride: int | None, batch_size: int, limit: int | None
) -> tuple[int, int]:
    """Context and stride, checked, as the other sizes are."""
    longest = min(model.config.max_position for model in models)
    context = min(_DEFAULT_CONTEXT, longest) if context is None else context
    if not 1 <= context <= longest:
        raise ValueError(f"context is {context}; it must be between 1 and {longest}, the model's longest")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ValueError(f"stride is {stride}; it must be between 1 and {context}, the context, to score every token")
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; it must be positive")
    sizes = dict.fromkeys(model.config.vocab_size for model in models)
    if len(sizes) > 1:
        raise ValueError(f"the models have {' and '.join(map(str, sizes))} tokens; compare models of one tokenizer")
    return context, stride


def _encode(
    model: Model, index: int, text: str | Sequence[int], limit: int | float
) -> tuple[Int[np.ndarray, "N"], int | None]:
    """Token ids of a text, of which all but the first are scored, at most `limit`; and the bytes that those stand for.

    Of a text cut inside a character, the whole character counts.
    """
    nbytes = None
    if isinstance(text, str):
        if model.tokenizer is None:
            raise ValueError(f"text {index} is text, but the model has no tokenizer; give token ids")
        found = model.tokenizer.backend.encode(text)
        ids, offsets = found.ids, found.offsets  # of a BOS, (0, 0)
        if len(ids) >= 2:
            stop = offsets[int(limit)][1] if limit < len(ids) - 1 else len(text)
            nbytes = len(text[offsets[0][1] : stop].encode())
    else:
        ids = [int(token) for token in text]
        outside = [token for token in ids if not 0 <= token < model.config.vocab_size]
        if outside:
            raise ValueError(
                f"text {index} has token id {outside[0]}; the vocabulary is 0 to {model.config.vocab_size - 1}"
            )
    if len(ids) < 2:
        raise ValueError(f"text {index} has {len(ids)} tokens; the first is context only: give at least two")
    return np.array(ids[: min(limit, len(ids) - 1) + 1], np.int32), nbytes


def _cut(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows of `length` targets: the first target, the first that is scored, and the end of each."""
    firsts = [0, *range(context, length, stride)]
    begins = [0, *range(stride, stride * len(firsts), stride)]
    return [(begin, first, min(begin + context, length)) for begin, first in zip(begins, firsts, strict=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class _Window:
    """Part of a text, `ids`: the targets from `begin` to `end`, of which those from `first` on are scored."""

    ids: Int[np.ndarray, "N"]
    begin: int
    first: int
    end: int

    @property
    def tokens(self) -> Int[np.ndarray, "T"]:
        return self.ids[self.begin : self.end]

    @property
    def targets(self) -> Int[np.ndarray, "T"]:
        return self.ids[self.begin + 1 : self.end + 1]

    @property
    def scores(self) -> int:
        return self.end - self.first


def _score(runners: Sequence[TeacherForced], windows: Sequence[_Window], chunk: int) -> Float[np.ndarray, "N"]:
    """What `_sums` gives for all scored tokens of windows that run together."""
    rows, lengths = runners[0].rows, [len(window.targets) for window in windows]
    width = -(-max(lengths) // chunk) * chunk
    targets, scored = np.zeros((rows, width), np.int32), np.zeros((rows, width), bool)
    for row, (window, length) in enumerate(zip(windows, lengths, strict=True)):
        targets[row, :length] = window.targets
        scored[row, window.first - window.begin : length] = True
    texts = [window.tokens for window in windows]
    sums = []
    for parts in zip(*(runner.all_logits(texts, chunk) for runner in runners), strict=True):
        part = np.s_[:, parts[0][0] : parts[0][0] + chunk]
        sums.append(_sums(tuple(logits for _, logits in parts), targets[part], scored[part]))
    return np.sum(jax.device_get(sums), axis=0, dtype=np.float64)


@jax.jit
def _sums(
    logits: tuple[Float[Array, "B T V"], ...], targets: Int[Array, "B T"], scored: Bool[Array, "B T"]
) -> Float[Array, "N"]:
    """Over the scored tokens: the loss; and of two models both losses, agreement and divergence."""
    log_probs = [jax.nn.log_softmax(x) for x in logits]
    found = [-jnp.take_along_axis(p, targets[..., None], axis=-1)[..., 0] for p in log_probs]
    if len(log_probs) == 2:
        model, reference = log_probs
        found.append(model.argmax(-1) == reference.argmax(-1))
        found.append((jnp.exp(reference) * (reference - model)).sum(-1))
    return jnp.stack([jnp.where(scored, x, 0).sum(dtype=jnp.float32) for x in found])
