"""How well a model predicts a text: its loss, teacher-forced through the KV cache, and how near another model's it is.

Weights, activations and cached keys and values are those that generation would read, in whatever numbers they are
stored: a scheme costs here what it costs there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence

import jax
import numpy as np
from jaxtyping import Int

from ..model import arguments
from ..model.loading import Model
from .prompts import each_prompt, naming
from .score import Score, Tokens, encode, make_score
from .stretches import Text
from .teacher_forced import Figures, TeacherForced

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
    """How well a model predicts texts.

    Attributes:
      tokens: how many were scored, each once.
      bytes: of UTF-8 that the scored tokens stand for; None of a text given as token ids.
      loss: mean negative log-likelihood, in nats a token.
      context, stride: how the text was cut; see `evaluate`.
      comparison: with another model, where there is one.
      texts: the same of each text alone.
      score: of a text alone, the figures of each of its tokens.
    """

    tokens: int
    bytes: int | None
    loss: float
    context: int
    stride: int
    comparison: Comparison | None = None
    texts: tuple["Evaluation", ...] = ()
    score: Score | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return float(np.exp(self.loss))

    @property
    def bits_per_byte(self) -> float | None:
        """The summed loss in bits, over `bytes`: comparable between tokenizers, which perplexity is not."""
        return None if self.bytes is None else self.loss * self.tokens / math.log(2) / self.bytes

    def as_dict(self) -> dict[str, int | float | None]:
        """The figures of all texts by name, the comparison's beside the others and None where there is none."""
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
@arguments.arguments(
    model=arguments.instance(Model, hint="as load_model returns it"),
    context=arguments.optional(arguments.whole),
    stride=arguments.optional(arguments.whole),
    batch_size=arguments.whole,
    limit=arguments.optional(arguments.whole),
    against=arguments.optional(arguments.instance(Model, hint="as load_model returns it")),
    progress=arguments.optional(arguments.function(2)),
)
def evaluate(
    model: Model,
    texts: Tokens | Sequence[Tokens],
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
      texts: one or several, as text or as token ids, each scored from its own beginning.
      context: tokens a window, at most the model's `max_position`; 1,024 or that by default.
      stride: tokens from one window to the next, 1 to `context`; half of it by default.
      batch_size: windows that run together.
      kv_dtype: of the model's KV cache, as `init_cache` takes it.
      limit: score the first so many tokens alone.
      against: a model with the same tokenizer, on the same devices, such as the unquantized one in float32; its KV
        cache is in its own dtype.
      progress: called after every batch with the tokens scored so far and those to score in all.

    Raises:
      TypeError, ValueError: a text of fewer than two tokens, text without a tokenizer, token ids outside the
        vocabulary, a size out of range, an unknown `kv_dtype`, or vocabularies that differ; all before any device work.
      FloatingPointError: a log-probability that is not finite, naming the text and the token.
    """
    models = [model] if against is None else [model, against]
    context, stride = _sizes(models, context, stride, batch_size, limit)
    texts = each_prompt(texts)
    left, sizes, windows = math.inf if limit is None else limit, [], []
    for index, text in enumerate(texts):
        ids, nbytes = _encode(model, index, text, left)
        sizes.append(nbytes)
        windows.append(_windows(f"text {index}", ids, context, stride))
        left -= len(ids) - 1
        if left == 0:
            break
    if not windows:
        raise ValueError("there is no text to score; give at least one")
    flat = [window for of_text in windows for window in of_text]
    dtypes = [kv_dtype, None][: len(models)]
    figures = iter(TeacherForced(models, flat, dtypes, max_batch_size=batch_size).run(progress))
    alone = [
        _of_text(of_text, [next(figures) for _ in of_text], nbytes, context, stride)
        for of_text, nbytes in zip(windows, sizes, strict=True)
    ]
    return _of_texts(alone)


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
        with naming(f"text {index}"):
            encoding = model.tokenizer.encoding(text)
        ids, offsets = encoding.ids, encoding.offsets  # of a BOS, (0, 0)
        if len(ids) >= 2:
            stop = offsets[int(limit)][1] if limit < len(ids) - 1 else len(text)
            nbytes = len(text[offsets[0][1] : stop].encode())
    else:
        ids = encode(model, f"text {index}", text)
    if len(ids) < 2:
        raise ValueError(f"text {index} has {len(ids)} tokens; the first is context only: give at least two")
    return np.array(ids[: min(limit, len(ids) - 1) + 1], np.int32), nbytes


def _cut(length: int, context: int, stride: int) -> list[tuple[int, int, int]]:
    """Windows of `length` targets: the first target, the first that is scored, and the end of each."""
    firsts = [0, *range(context, length, stride)]
    begins = [0, *range(stride, stride * len(firsts), stride)]
    return [(begin, first, min(begin + context, length)) for begin, first in zip(begins, firsts, strict=True)]


def _windows(name: str, ids: Int[np.ndarray, "N"], context: int, stride: int) -> list[Text]:
    """A text cut into windows, each of which scores what no earlier one has."""
    windows = []
    for begin, first, end in _cut(len(ids) - 1, context, stride):
        whose = f"{name} from token {begin} on" if begin else name
        windows.append(Text(whose, ids[begin : end + 1], first - begin + 1))
    return windows


def _of_text(
    windows: Sequence[Text], figures: Sequence[Figures], nbytes: int | None, context: int, stride: int
) -> Evaluation:
    tokens = np.concatenate([window.targets for window in windows])
    whole = jax.tree.map(lambda *x: np.concatenate(x), *figures)
    score, means = make_score(tokens, whole), {name: float(x.mean(dtype=np.float64)) for name, x in whole[1].items()}
    comparison = Comparison(-means["reference"], means["agreement"], means["divergence"]) if means else None
    return Evaluation(len(tokens), nbytes, -score.sum / len(tokens), context, stride, comparison, score=score)


def _of_texts(texts: Sequence[Evaluation]) -> Evaluation:
    """Each text counts by its tokens."""
    tokens, sizes = sum(text.tokens for text in texts), [text.bytes for text in texts]

    def mean(values: Iterable[float]) -> float:
        return sum(value * text.tokens for value, text in zip(values, texts, strict=True)) / tokens

    compared = [text.comparison for text in texts if text.comparison is not None]
    names = [field.name for field in dataclasses.fields(Comparison)]
    comparison = Comparison(*(mean(getattr(c, name) for c in compared) for name in names)) if compared else None
    nbytes, loss = None if None in sizes else sum(sizes), mean(text.loss for text in texts)
    return Evaluation(tokens, nbytes, loss, texts[0].context, texts[0].stride, comparison, tuple(texts))
