"""Quality of a language model on held-out text: perplexity, and distance from the model it was made from.

Perplexities measured under different protocols (corpus, window length, number of windows) are different
quantities, even for the same model; `common.measure.results` therefore stores the protocol with every figure.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

TOKENS_ON_GPU = 4096  # read together; memory for their logits is 4096 · vocabulary · 2 bytes in bfloat16


@dataclass(frozen=True)
class Quality:
    """What `evaluate` measures. `kl` (nats per token) and `top1` (share) exist only against a baseline."""

    perplexity: float
    standard_error: float  # of the perplexity, over windows
    kl: float | None = None  # KL(original ‖ model)
    top1: float | None = None  # how often both models' most likely next token is the same


@dataclass
class Baseline:
    """The original model's logits on the first `windows` test windows, kept on the CPU as they came.

    They let a compressed model be compared with the original without both being in memory at once;
    the price is windows · (seqlen - 1) · vocabulary · 2 bytes in bfloat16.
    """

    windows: int
    logits: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def evaluate(
    model: nn.Module, windows: Tensor, *, keep: Baseline | None = None, against: Baseline | None = None
) -> Quality:
    """One pass over test windows [windows, seqlen], each on its own.

    perplexity = exp(mean negative log-likelihood of every token that has a predecessor in its window).
    keep: an empty Baseline to fill from this model. against: one filled from the original; adds kl and top1.
    """
    model.eval()
    losses, divergences, agreements = [], [], []
    every = tqdm(_logits(model, windows), desc="evaluate", total=len(windows), unit="window", leave=False)
    for number, (ids, logits) in enumerate(every):
        log_probs = F.log_softmax(logits.float(), dim=-1)
        losses.append(F.nll_loss(log_probs, ids[1:]).item())
        if keep is not None and number < keep.windows:
            keep.logits.append(logits.cpu())
        if against is not None and number < len(against.logits):
            rows = min(logits.shape[-1], against.logits[number].shape[-1])  # one tokenizer, padded differently
            original = F.log_softmax(against.logits[number][:, :rows].to(ids.device).float(), dim=-1)
            if rows < log_probs.shape[-1]:
                log_probs = log_probs[:, :rows].log_softmax(-1)
            divergences.append(F.kl_div(log_probs, original, log_target=True, reduction="sum").item() / len(logits))
            agreements.append((original.argmax(-1) == log_probs.argmax(-1)).float().mean().item())
    loss = torch.tensor(losses, dtype=torch.float64)
    if not loss.isfinite().all():
        raise ValueError("The model's loss is not finite: its weights or its logits hold NaN or inf.")
    perplexity = loss.mean().exp().item()
    error = perplexity * loss.std(correction=1).item() / math.sqrt(len(loss)) if len(loss) > 1 else 0.0
    return Quality(perplexity, error, _mean(divergences), _mean(agreements))


def _logits(model: nn.Module, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window's token ids [seqlen], and the logits of every position that predicts one [seqlen - 1, vocabulary].

    A GPU takes as long for several short windows as for one, since it waits for Python meanwhile.
    """
    together = max(1, TOKENS_ON_GPU // windows.shape[1]) if model.device.type == "cuda" else 1
    for batch in windows.split(together):
        ids = batch.to(model.device)
        yield from zip(ids, model(input_ids=ids, use_cache=False).logits[:, :-1], strict=True)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@torch.no_grad()
def generate(model: nn.Module, tokenizer, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation of `prompt`, which goes through the chat template where the tokenizer has one."""
    text = prompt
    if tokenizer.chat_template:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt").to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad)
    continuation = output[0, inputs.input_ids.shape[1] :]
    return tokenizer.decode(continuation, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()
