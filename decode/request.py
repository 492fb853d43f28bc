"""One request on the host: its tokens, its text, and when it ends."""

import bisect
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Literal

from ..model.tokenizer import StreamDecoder, Tokenizer
from .constraints import Constraints
from .logprobs import check_finite
from .sampling.draw import SampleLogprobs
from .sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the model's own distribution: before penalties, temperature and filters.

    Attributes:
      token: the sampled token.
      logprob: its natural log-probability.
      rank: its rank, 1 for the likeliest.
      top: the likeliest tokens and theirs, as many as `SamplingParams.logprobs` asks for.
    """

    token: int
    logprob: float
    rank: int
    top: Mapping[int, float]


@dataclasses.dataclass(frozen=True)
class RequestOutput:
    """What `generate` returns for one prompt.

    Attributes:
      prompt_tokens: the prompt's token ids.
      tokens: the new token ids, a stop token included.
      text: their text, cut at a stop string; None where the model has no tokenizer.
      finish_reason: "stop" (a stop token or string, or a constraint that allows nothing more), "length" (max_tokens, or
        the longest sequence), "abort" (cut short before either), or "error".
      stop_reason: the stop token id or stop string that ended it, or None.
      logprobs: one entry a new token where asked for, else None.
      prompt_logprobs: where asked for, an entry a token of the prompt: None for the first, which nothing comes before,
        then natural log-probabilities by token id: the token's own, and those of as many of the likeliest as
        `SamplingParams.prompt_logprobs` asks for. Else None, and of all samples but the first.
      seed: gives the same tokens again, as those of one sample.
      ttft: seconds from submission to the first token.
      tpot: seconds a token after the first; None for fewer than two.
      queue_time: seconds from submission until it was begun.
      error: what failed, where `finish_reason` is "error".
      drafted, accepted: tokens that a drafter guessed, and those of them that the model drew too.
      others: with `SamplingParams.n` above 1, the other samples; see `samples`.
    """

    prompt_tokens: list[int]
    tokens: list[int]
    text: str | None
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: list[TokenLogprobs] | None
    seed: int
    ttft: float
    tpot: float | None
    queue_time: float = 0.0
    error: Exception | None = None
    prompt_logprobs: list[Mapping[int, float] | None] | None = None
    drafted: int = 0
    accepted: int = 0
    others: "Sequence[RequestOutput]" = ()

    @property
    def samples(self) -> "list[RequestOutput]":
        """All `SamplingParams.n` samples of the prompt, this one first."""
        return [self, *self.others]

    def raise_for_error(self) -> None:
        """Raise what failed in any of the samples."""
        for sample in self.samples:
            if sample.error is not None:
                raise sample.error


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """New output of one request.

    Attributes:
      index: the prompt's position in the list of prompts.
      tokens: new token ids.
      text: new text; "" while it may yet become a stop string or an unfinished character.
      finish_reason: set in the last chunk of each sample.
      output: the whole result, in the last chunk of the sample that ends last.
      sample: which of the `SamplingParams.n` it is of, from 0.
    """

    index: int
    tokens: list[int]
    text: str
    finish_reason: FinishReason | None
    output: RequestOutput | None
    sample: int = 0


class Request:
    """Collects the tokens of a request, or of a sample of it; decides when it is finished and which text may be shown.

    Args:
      prompt: its token ids.
      params: what was asked for.
      max_tokens: `params.max_tokens`, bounded by the longest sequence the model takes.
      seed: of its random numbers.
      eos_token_ids: the model's end-of-sequence tokens.
      tokenizer: None leaves the text out.
      constraints: what may follow its tokens; None for anything.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        max_tokens: int,
        seed: int,
        eos_token_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        constraints: Constraints | None = None,
    ):
        self.prompt = list(prompt)
        self.samples = [self]  # all of the prompt, in order
        self.constraints = constraints
        self.params = params
        self.max_tokens = max_tokens
        self.seed = seed
        self.tokens: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None if params.logprobs is None else []
        self.prompt_logprobs: list[Mapping[int, float] | None] | None = (
            None if params.prompt_logprobs is None else [None] * len(self.prompt)
        )
        self.text: str | None = None if tokenizer is None else ""  # what follows the prompt's text, its space included
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._stop_tokens = set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, params.skip_special_tokens, prompt)
        special = () if tokenizer is None or not params.skip_special_tokens else tokenizer.special_token_ids
        self._whole = (
            _WholeText(tokenizer, prompt) if any(token in stop for stop in params.stop for token in special) else None
        )
        self._shown = 0
        self.drafted = self.accepted = 0  # as in `RequestOutput`
        self.error: Exception | None = None
        self._started = time.perf_counter()
        self._begun: float | None = None
        self._first_token: float | None = None
        self._last_token = self._started

    def start_clock(self) -> None:
        """Count from now: called when the request is submitted."""
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Called when something of it is run, at first or again."""
        self._begun = self._begun or time.perf_counter()

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def extend(self, tokens: Sequence[int], logprobs: SampleLogprobs | None = None, first_logprobs: int = 0) -> None:
        """Take the next sampled tokens, as far as the request goes.

        Args:
          tokens: their ids; those after the request's end are dropped.
          logprobs: theirs, on the host.
          first_logprobs: the place in them of the first of the tokens.
        """
        first = len(self.tokens)
        block = 1 if self.params.stop else max(1, len(tokens))  # stop strings are looked for token by token
        for at in range(0, len(tokens), block):
            if not self.finished:
                self._push(tokens[at : at + block])
        if self.logprobs is not None and logprobs is not None:
            for at, token in enumerate(self.tokens[first:], first_logprobs):
                self.logprobs.append(_token_logprobs(logprobs, at, token, self.params.logprobs))

    def score_prompt(self, start: int, logprobs: SampleLogprobs, name: str, dtype: str) -> None:
        """Take the log-probabilities of what follows the prompt's tokens from number `start` on, if they are asked for.

        Raises:
          FloatingPointError: one that is not finite, as of `check_finite`, for which `name` and `dtype` are.
        """
        if self.prompt_logprobs is None:
            return
        count, following = self.params.prompt_logprobs, self.prompt[start + 1 :][: len(logprobs.chosen)]
        check_finite(name, dtype, self.prompt, start + 1, logprobs.chosen[: len(following)])
        for at, token in enumerate(following):
            if self.prompt_logprobs[start + 1 + at] is None:  # or it is read again, now with some output
                ids, values = logprobs.top_ids[at, :count].tolist(), logprobs.top[at, :count].tolist()
                own = {token: float(logprobs.chosen[at])}
                self.prompt_logprobs[start + 1 + at] = own | dict(zip(ids, values, strict=True))

    def constrain(self, tokens: Sequence[int]) -> None:
        """Tell the constraints, if any, of tokens that were drawn, now or again; may finish the request."""
        if self.constraints is None or self.finished:
            return
        try:
            for token in tokens:
                self.constraints.accept(token)
            if not self.constraints.mask.any():
                self._add_text([], last=True)
                self.finish("stop")
        except Exception as error:
            self.finish("error", error)

    def count_drafts(self, drafted: int, accepted: int) -> None:
        """Take note of what was drafted for the last tokens."""
        self.drafted += drafted
        self.accepted += accepted

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """End the request before it ends itself."""
        self.finish_reason, self.error = reason, error

    def _push(self, tokens: Sequence[int]) -> None:
        self._last_token = time.perf_counter()
        self._first_token = self._first_token or self._last_token
        tokens = tokens[: self.max_tokens - len(self.tokens)]
        before = max(0, self.params.min_tokens - len(self.tokens) - 1)  # tokens that cannot be the last
        end = next((n for n in range(before, len(tokens)) if tokens[n] in self._stop_tokens), None)
        if end is None:
            self.tokens += tokens
            full = len(self.tokens) >= self.max_tokens
            self._add_text(tokens, last=full, stops=len(self.tokens) >= self.params.min_tokens)
            if full and not self.finished:
                self.finish_reason = "length"
        else:
            self.tokens += tokens[: end + 1]
            self.finish_reason, self.stop_reason = "stop", tokens[end]
            self._add_text(tokens[: end + self.params.include_stop_str_in_output], last=True)

    def take_text(self) -> str:
        """Text that is final and was not taken before: never part of what may yet become a stop string."""
        if self.text is None:
            return ""
        held = 0 if self.finished else max((len(s) for s in self.params.stop), default=1) - 1
        end = max(self._shown, len(self.text) - held)
        new, self._shown = self.text[self._shown : end], end
        return new

    def output(self) -> RequestOutput:
        """The result so far; of an unfinished request its finish reason is "abort"."""
        first = self._first_token if self._first_token is not None else self._last_token
        count = len(self.tokens)
        return RequestOutput(
            prompt_tokens=self.prompt,
            tokens=list(self.tokens),
            text=self.text,
            finish_reason=self.finish_reason or "abort",
            stop_reason=self.stop_reason,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            seed=self.seed,
            ttft=first - self._started,
            tpot=(self._last_token - first) / (count - 1) if count > 1 else None,
            queue_time=(self._begun or self._last_token) - self._started,
            error=self.error,
            prompt_logprobs=self.prompt_logprobs,
            drafted=self.drafted,
            accepted=self.accepted,
        )

    def result(self) -> RequestOutput | None:
        """The output of all samples; None until the last has finished."""
        if not all(sample.finished for sample in self.samples):
            return None
        first, *others = (sample.output() for sample in self.samples)
        return dataclasses.replace(first, others=others)

    def _add_text(self, tokens: list[int], last: bool, stops: bool = False) -> None:
        if self._decoder is None:
            return
        searched = len(self.text)
        self.text += self._decoder.feed(tokens) + (self._decoder.flush() if last else "")
        text, cut = self.text, lambda end: end
        if self._whole is not None:
            searched = self._whole.add(tokens, last, len(self.text))
            text, cut = self._whole.text, self._whole.shown
        if not stops:
            return
        # The earliest stop string that the new text completes; a longer one may have begun in the old text.
        found = [
            (at, stop) for stop in self.params.stop if (at := text.find(stop, max(0, searched - len(stop) + 1))) >= 0
        ]
        if found:
            at, stop = min(found)
            self.finish_reason, self.stop_reason = "stop", stop
            self.text = self.text[: cut(at + len(stop) if self.params.include_stop_str_in_output else at)]


def _token_logprobs(logprobs: SampleLogprobs, at: int, token: int, count: int) -> TokenLogprobs:
    ids, values = logprobs.top_ids[at, :count], logprobs.top[at, :count]
    return TokenLogprobs(
        token=token,
        logprob=float(logprobs.chosen[at]),
        rank=int(logprobs.rank[at]),
        top={int(i): float(v) for i, v in zip(ids, values, strict=True)},
    )


class _WholeText:
    """A request's text with the special tokens that its own leaves out, for stop strings that hold one."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]):
        self.text = ""
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=False, context=prompt)
        self._lengths = [(0, 0)]  # of this text and of the request's, after each push

    def add(self, tokens: list[int], last: bool, shown: int) -> int:
        """Add tokens, with which the request's text has `shown` characters; returns how many were here before."""
        before = len(self.text)
        self.text += self._decoder.feed(tokens) + (self._decoder.flush() if last else "")
        self._lengths.append((len(self.text), shown))
        return before

    def shown(self, end: int) -> int:
        """How many characters of the request's text come from the first `end` of this one."""
        after = bisect.bisect_left(self._lengths, (end,))
        if after == len(self._lengths):
            return self._lengths[-1][1]
        (start, before), (_, total) = self._lengths[max(after - 1, 0)], self._lengths[after]
        return min(before + end - start, total)
