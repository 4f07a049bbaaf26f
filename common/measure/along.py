"""How two models differ along a text, position by position: a student on its own words, the worth of a draft."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from common.measure.evaluation import Estimate, _logits, estimate


@dataclass(frozen=True)
class Along:
    """Per position [windows, seqlen - 1], p the teacher's and q the student's next-token distribution."""

    forward: Tensor  # KL(p ‖ q), nats
    reverse: Tensor  # KL(q ‖ p), nats
    overlap: Tensor  # Σ min(p, q) = 1 - total variation: what a draft q is accepted with

    def mean(self, what: str, start: int = 0) -> Estimate:
        """Mean of one of them over positions from `start` on, with its interval over windows."""
        return estimate(self.per_window(what, start))

    def per_window(self, what: str, start: int = 0) -> Tensor:
        """Mean of one of them over positions from `start` on, of each window."""
        return getattr(self, what)[:, start:].double().mean(1)

    def by_position(self, what: str, parts: int) -> dict[float, float]:
        """Mean of one of them in `parts` equal stretches of the text, by the middle of each."""
        values = getattr(self, what).mean(0).tensor_split(parts)
        ends = torch.tensor([0, *(len(v) for v in values)]).cumsum(0).tolist()
        return {(a + b) / 2: v.mean().item() for a, b, v in zip(ends, ends[1:], values, strict=False)}


@torch.no_grad()
def along(teacher: nn.Module, student: nn.Module, windows: Tensor) -> Along:
    """Both models on windows [n, seqlen], each a causal LM or an object with `stream` (as `evaluate` takes them)."""
    rows = []
    pairs = zip(_logits(teacher, windows), _logits(student, windows), strict=True)
    for (_, p), (_, q) in tqdm(pairs, desc="along the text", total=len(windows), unit="window", leave=False):
        common = min(p.shape[-1], q.shape[-1])  # one tokenizer, padded differently
        log_p, log_q = (F.log_softmax(z[:, :common], dim=-1, dtype=torch.float32) for z in (p, q.to(p.device)))
        p, q = log_p.exp(), log_q.exp()
        forward, reverse = (p * (log_p - log_q)).sum(-1), (q * (log_q - log_p)).sum(-1)
        rows.append(torch.stack((forward, reverse, torch.minimum(p, q).sum(-1))).cpu())
    return Along(*torch.stack(rows, 1))
