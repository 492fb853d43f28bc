"""lm-evaluation-harness over Ridgeline, with the numbers of its own `hf` model.

import lm_eval, ridgeline as rl
from lm_eval_adapter import RidgelineLM

lm_eval.simple_evaluate(RidgelineLM(rl.load_model("path/to/checkpoint")), tasks=["arc_easy"])
"""

import ridgeline as rl

try:
    from lm_eval.api.model import LM
except ImportError:  # the methods take whatever has `args`
    LM = object


class RidgelineLM(LM):
    def __init__(self, model, add_bos_token=False, max_gen_toks=256):
        super().__init__()
        self.model, self.add_bos_token, self.max_gen_toks = model, add_bos_token, max_gen_toks
        self.max_length, tokenizer = model.config.max_position, model.tokenizer
        self.prefix_token = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode(self, text):
        return self.model.tokenizer.encode(text, add_special_tokens=self.add_bos_token)

    def encode_pair(self, context, continuation):
        if context == "":
            return [self.prefix_token], self.model.tokenizer.encode(continuation, add_special_tokens=False)
        stripped = self.encode(context.rstrip())
        return stripped, self.encode(context + continuation)[len(stripped) :]

    def loglikelihood(self, requests, **_):
        pairs = [self.encode_pair(*request.args) for request in requests]
        contexts = [context[-(self.max_length + 1 - len(own)) :] for context, own in pairs]
        scores = rl.score(self.model, contexts, [own for _, own in pairs])
        return [(score.sum, bool(score.greedy.all())) for score in scores]

    def loglikelihood_rolling(self, requests, **_):
        """Every token once, in windows of the model's longest context, of which the last is full too."""
        totals, windows = [0.0] * len(requests), []
        for index, request in enumerate(requests):
            ids = [self.prefix_token, *self.encode(*request.args)]
            for first in range(1, len(ids), self.max_length):
                end = min(first + self.max_length, len(ids))
                windows.append((index, ids[max(0, end - 1 - self.max_length) : first], ids[first:end]))
        scores = rl.score(self.model, [context for _, context, _ in windows], [own for *_, own in windows])
        for (index, *_), score in zip(windows, scores, strict=True):
            totals[index] += score.sum
        return totals

    def generate_until(self, requests, **_):
        prompts, sampling = [], []
        for context, options in (request.args for request in requests):
            new, draws = options.get("max_gen_toks", self.max_gen_toks), bool(options.get("do_sample"))
            given = {name: options[name] for name in ("temperature", "top_p", "top_k") if draws and name in options}
            given = {"temperature": float(draws)} | given
            prompts.append(self.encode(context)[-(self.max_length - new) :])
            sampling.append(rl.SamplingParams(**given, max_tokens=new, stop=options.get("until")))
        return [output.text for output in rl.generate(self.model, prompts, sampling)]
