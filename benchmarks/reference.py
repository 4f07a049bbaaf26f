"""Perplexity by lm-eval's rolling log-likelihood, against ours on the same tokens."""

import math

import torch

from benchmarks.contenders import Clock, Task
from common.measure.evaluation import evaluate


def lm_eval(task: Task, clock: Clock, tokens: int, seqlen: int) -> dict[str, tuple[float, str]]:
    """Both perplexities of one text whose `tokens` tokens are scored once each, in windows of `seqlen`.

    lm-eval puts the end-of-text token before the text and lets each window begin with the last token of the one
    before: its `seqlen` inputs predict `seqlen` tokens. In our terms these are windows of seqlen + 1 tokens.

    By default lm-eval takes the softmax in the type of the logits. In bfloat16 that alone changes the perplexity, so
    the comparison asks for float32, and the default is a figure of its own.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = task.tokenizer
    text = tokenizer.decode(task.windows.flatten()[:tokens])
    ids = tokenizer(text, add_special_tokens=False).input_ids
    ids = ids[: len(ids) // seqlen * seqlen]  # whole windows only: a shorter last one would see other context
    text = tokenizer.decode(ids)
    if tokenizer(text, add_special_tokens=False).input_ids != ids:
        raise ValueError("The text does not survive decoding and encoding: choose other tokens.")
    figures = {}
    for key, softmax in (("perplexity-lm-eval", "float32"), ("perplexity-lm-eval-default", None)):
        library = HFLM(task.model, tokenizer=tokenizer, max_length=seqlen, batch_size=1, softmax_dtype=softmax)
        request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
        with clock:
            total = library.loglikelihood_rolling([request], disable_tqdm=True)[0]
        figures[key] = (math.exp(-total / len(ids)), "ppl")
    stream = torch.tensor([library.prefix_token_id, *ids])
    windows = torch.stack([stream[i : i + seqlen + 1] for i in range(0, len(ids), seqlen)])
    ours = evaluate(task.model, windows).perplexity
    return figures | {"perplexity-ours": (ours, "ppl")}
