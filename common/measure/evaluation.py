"""Quality of a language model on held-out text: perplexity, and distance from the model it was made from.

Perplexities measured under different protocols (corpus, window length, number of windows) are different
quantities, even for the same model; `common.measure.results` therefore stores the protocol with every figure.

Windows differ in difficulty far more than models do, so the standard error of one perplexity says nothing of the
difference between two. `compare` is paired: each window is its own control; what counts is how its difference varies.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import pandas as pd
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

CONFIDENCE = 0.95
TOKENS_TOGETHER = {"cuda": 4096, "cpu": 512}  # read in one pass: a GPU waits for Python meanwhile, a CPU gains nothing


class _PerWindow:
    """What `compare` needs; in slots, since `vars(quality)` is the row of figures that notebooks show."""

    __slots__ = ("choices", "divergences", "hits", "losses")


@dataclass
class Quality(_PerWindow):
    """What `evaluate` measures. `kl` (nats per token) and `top1` (share) exist only against a baseline.

    After `evaluate` also, for `compare`: losses [windows], nats per token of each; choices [windows, seqlen - 1], the
    likeliest token at every position; hits, bool of the same shape, whether it was the true one; divergences, the KL of
    each window that was compared.
    """

    perplexity: float
    standard_error: float  # of this perplexity, over windows; a difference of two has another: `compare`
    kl: float | None = None  # KL(original ‖ model)
    top1: float | None = None  # how often both models' most likely next token is the same

    def first(self, windows: int) -> "Quality":
        """The same model on the first of its windows alone, without kl and top1."""
        return quality_of(self.losses[:windows], self.hits[:windows], self.choices[:windows])


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
    model: a causal LM, or an object whose `stream(windows)` yields each window's logits [seqlen, vocabulary].
    """
    losses, hits, choices, divergences, agreements = [], [], [], [], []
    every = tqdm(_logits(model, windows), desc="evaluate", total=len(windows), unit="window", leave=False)
    for number, (ids, logits) in enumerate(every):
        log_probs = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses.append(F.nll_loss(log_probs, ids[1:]).item())
        choice = log_probs.argmax(-1)
        hits.append((choice == ids[1:]).cpu())
        choices.append(choice.int().cpu())
        if keep is not None and number < keep.windows:
            keep.logits.append(logits.cpu())
        if against is not None and number < len(against.logits):
            rows = min(logits.shape[-1], against.logits[number].shape[-1])  # one tokenizer, padded differently
            original = F.log_softmax(against.logits[number][:, :rows].to(ids.device), dim=-1, dtype=torch.float32)
            if rows < log_probs.shape[-1]:
                log_probs = log_probs[:, :rows].log_softmax(-1)
            divergences.append(F.kl_div(log_probs, original, log_target=True, reduction="sum").item() / len(logits))
            agreements.append((original.argmax(-1) == choice).float().mean().item())
    quality = quality_of(torch.tensor(losses, dtype=torch.float64), torch.stack(hits), torch.stack(choices))
    quality.kl, quality.top1 = _mean(divergences), _mean(agreements)
    quality.divergences = torch.tensor(divergences, dtype=torch.float64)
    return quality


def quality_of(losses: Tensor, hits: Tensor, choices: Tensor) -> Quality:
    """A Quality from what was measured of each window; ValueError where a loss is not finite."""
    if not losses.isfinite().all():
        raise ValueError("The model's loss is not finite: its weights or its logits hold NaN or inf.")
    perplexity = losses.mean().exp().item()
    error = perplexity * losses.std(correction=1).item() / math.sqrt(len(losses)) if len(losses) > 1 else 0.0
    quality = Quality(perplexity, error)
    quality.losses, quality.hits, quality.choices = losses, hits, choices
    quality.divergences = torch.empty(0, dtype=torch.float64)
    return quality


def _logits(model: nn.Module, windows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each window's token ids [seqlen], and the logits of every position that predicts one [seqlen - 1, vocabulary]."""
    if hasattr(model, "stream"):  # a model that does not fit the card, read block by block
        for ids, logits in zip(windows, model.stream(windows), strict=True):
            yield ids.to(logits.device), logits[:-1]
        return
    model.eval()
    for batch in windows.split(windows_together(windows, model.device)):
        ids = batch.to(model.device)
        yield from zip(ids, model(input_ids=ids, use_cache=False).logits[:, :-1], strict=True)


def windows_together(windows: Tensor, device: torch.device) -> int:
    """How many of windows [n, seqlen] a model reads in one pass on `device`."""
    return max(1, TOKENS_TOGETHER.get(device.type, 512) // windows.shape[1])


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error and its 95 % interval."""

    value: float
    standard_error: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.4g} [{self.low:+.4g}, {self.high:+.4g}]"


@dataclass(frozen=True)
class Comparison:
    """A model against a reference on the same windows; below zero (or one) the model is better."""

    log_perplexity: Estimate  # difference of the mean losses, nats per token
    ratio: Estimate  # of the perplexities, with the interval that follows from it
    flips: float  # share of positions where the most likely token is another one
    right_before: float  # share of positions that flipped away from the true token
    right_after: float  # share of positions that flipped to it

    def __str__(self) -> str:
        ratio = self.ratio
        return f"perplexity × {ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}], {self.flips:.1%} of tokens flipped"


def estimate(differences: Tensor) -> Estimate:
    """Mean of paired differences [n], n ≥ 2, with Student's interval for n - 1 degrees of freedom."""
    n = len(differences)
    if n < 2:
        raise ValueError("An interval needs at least 2 windows or items: with one, nothing is known of how they vary.")
    mean = differences.double().mean().item()
    error = differences.double().std(correction=1).item() / math.sqrt(n)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1).item() * error
    return Estimate(mean, error, mean - reach, mean + reach)


def compare(quality: Quality, reference: Quality) -> Comparison:
    """How a model differs from a reference evaluated on the same windows; ValueError where their number differs."""
    if quality.losses.shape != reference.losses.shape or quality.hits.shape != reference.hits.shape:
        raise ValueError("A paired comparison needs both models on the same windows: these saw different numbers.")
    difference = estimate(quality.losses - reference.losses)
    exp = [math.exp(x) for x in (difference.value, difference.low, difference.high)]
    ratio = Estimate(exp[0], exp[0] * difference.standard_error, *exp[1:])
    flipped = quality.choices != reference.choices
    shares = (flipped, flipped & reference.hits, flipped & quality.hits)
    return Comparison(difference, ratio, *(share.double().mean().item() for share in shares))


def better(a: Quality, b: Quality) -> bool:
    """Whether a's loss is lower than b's beyond the 95 % interval of the paired difference."""
    return compare(a, b).log_perplexity.high < 0


def pareto_front(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Of (bits, distortion, name) those that no other has both at most the bits and less distortion of, by bits."""
    front = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def quality_table(qualities: dict[str, Quality], reference: Quality) -> pd.DataFrame:
    """A row per model: perplexity, the multiple of the reference's with its interval, KL, share of flipped tokens."""
    rows = {}
    for name, quality in qualities.items():
        row = {"perplexity": f"{quality.perplexity:.2f}"}
        if quality.losses is not reference.losses:
            found = compare(quality, reference)
            ratio = found.ratio
            row["× reference [95 %]"] = f"{ratio.value:.3f} [{ratio.low:.3f}, {ratio.high:.3f}]"
            row["KL"] = "" if quality.kl is None else f"{quality.kl:.4f}"
            row["tokens flipped"] = f"{found.flips:.1%}"
        rows[name] = row
    return pd.DataFrame(rows).T.fillna("")


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
