"""The example adapter, held to the harness's own way of scoring over transformers in float32."""

import itertools
import types

import numpy as np
import pytest

import ridgeline as rl
from lm_eval_adapter import RidgelineLM
from ridgeline.model import loading

PAIRS = [
    ("Once upon a time there was a", " little girl"),
    ("Once upon a time there was a", " king, who had three sons."),
    ("Once upon a time there was a ", "king"),  # the blank moves
    ("The little gi", "rl went home"),  # the tokens before the border are others together
    ("", "The old king"),
    ("In the forest " * 400, "he met a wolf"),  # longer than the model takes
    ("The dog ran after the", " cat, and"),
]
LONG = "There was once a miller who had a daughter, and she was clever. " * 130  # more than two windows


def requests(*arguments):
    """As the harness makes them, as far as adapters look."""
    return [types.SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def draft() -> rl.Model:
    return rl.load_model("bundled-draft", dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    """The model, the tokenizer, and float32 log-probabilities of what follows each of the ids, by transformers."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    directory = loading.BUNDLED["bundled-draft"]
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    @torch.no_grad()
    def log_probs(ids):
        return model(torch.tensor([ids])).logits.log_softmax(-1)[0].numpy()

    return model, transformers.AutoTokenizer.from_pretrained(directory), log_probs


def loglikelihood(log_probs, ids, first, longest):
    """Of the tokens from number `first` on, each of which sees at most `longest`: their sum, and if all are likeliest.

    `_loglikelihood_tokens` of lm_eval/models/huggingface.py.
    """
    cut = max(0, len(ids) - longest - 1)
    found = log_probs(ids[cut:-1])[first - cut - 1 :]
    targets = np.array(ids[first:])
    return found[np.arange(len(targets)), targets].sum(dtype=np.float64), bool((found.argmax(-1) == targets).all())


def test_loglikelihoods_are_those_of_transformers(draft, theirs):
    _, tokenizer, log_probs = theirs
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    found = RidgelineLM(draft).loglikelihood(requests(*PAIRS))
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        blanks = len(context) - len(context.rstrip())
        before = encode(context[: len(context) - blanks]) if context else [tokenizer.bos_token_id]
        own = encode(context + continuation)[len(before) if context else 0 :]
        expected = loglikelihood(log_probs, before + own, len(before), draft.config.max_position)
        assert total == pytest.approx(expected[0], abs=2e-4)
        assert greedy == expected[1]


def test_rolling_loglikelihoods_are_those_of_transformers(draft, theirs):
    _, tokenizer, log_probs = theirs
    texts, longest = ["The old king", LONG], draft.config.max_position
    found = RidgelineLM(draft).loglikelihood_rolling(requests(*((text,) for text in texts)))
    for text, total in zip(texts, found, strict=True):
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]
        ends = [*range(1 + longest, len(ids), longest), len(ids)]
        parts = [
            loglikelihood(log_probs, ids[:end], first, longest)[0] for first, end in itertools.pairwise([1, *ends])
        ]
        assert len(parts) == (3 if text == LONG else 1)
        assert total == pytest.approx(sum(parts), abs=1e-2)


def test_greedy_texts_are_those_of_transformers(draft, theirs):
    model, tokenizer, _ = theirs
    contexts, options = ["Once upon a time", "The dog ran after the"], {"until": ["."], "max_gen_toks": 24}
    found = RidgelineLM(draft).generate_until(requests(*((context, options) for context in contexts)))
    for context, text in zip(contexts, found, strict=True):
        ids = tokenizer(context, add_special_tokens=False, return_tensors="pt")
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert text == tokenizer.decode(out, skip_special_tokens=True).split(".")[0]


def test_loglikelihoods_are_those_of_score(draft):
    """Without transformers: a BOS where it is asked for, and what the model's own tokenizer makes of the texts."""
    adapter = RidgelineLM(draft, add_bos_token=True)
    pairs = [pair for pair in PAIRS if pair[0] and len(pair[0]) < 1000]
    found = adapter.loglikelihood(requests(*pairs))
    scores = rl.score(draft, *zip(*pairs, strict=True))
    assert [total for total, _ in found] == [score.sum for score in scores]
    (total,) = adapter.loglikelihood_rolling(requests((LONG[:200],)))
    bos = draft.tokenizer.bos_token_id
    twice = rl.score(draft, [[bos, *draft.tokenizer.encode(LONG[:200])]])[0]
    assert total == pytest.approx(twice.sum, abs=1e-4)
