"""Speculative decoding: a draft guesses, the model checks all guesses in one pass, and its distribution stays its own.

Leviathan et al., 2023 (arXiv:2211.17192); Chen et al., 2023 (arXiv:2302.01318). p is the model's next-token
distribution, q the draft's. A guess d is kept with probability min(1, p(d) / q(d)); the first that is not kept is
replaced by a draw from the rest, max(p - q, 0). Kept with probability Σ min(p, q): one minus their total variation.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.measure.cuda_graph import graphed
from common.methods.static_cache import Reader, require_static_cache


def draw(weights: Tensor) -> Tensor:
    """One index [...] from weights [..., n] that need not add up to one, without asking the host for anything.

    The first of n exponential clocks with these rates rings at i with probability weights_i / Σ weights.
    """
    return (weights / torch.empty_like(weights).exponential_()).argmax(-1)


def accept(drafted: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """How many of the drafted tokens [batch, γ] are kept [batch], and the token that follows them [batch].

    p [batch, γ + 1, vocabulary]: the model's distributions at the drafted tokens and after the last; q
    [batch, γ, vocabulary]: those that the tokens were drawn from.
    """
    chosen = drafted[..., None]
    ratio = (p[:, :-1].gather(-1, chosen) / q.gather(-1, chosen))[..., 0]
    kept = (torch.rand_like(ratio) < ratio).long().cumprod(-1).sum(-1)
    after = kept[:, None, None].expand(-1, 1, p.shape[-1])
    q = F.pad(q, (0, 0, 0, 1))  # nothing was drafted after the last token: there the rest is p itself
    return kept, draw((p.gather(1, after) - q.gather(1, after)).clamp_min(0)[:, 0])


def expected_tokens(acceptance: float, drafted: int) -> float:
    """Tokens per pass of the model if each drafted token is kept with the same probability: 1 + α + ... + α^γ."""
    return sum(acceptance**i for i in range(drafted + 1))


def expected_speedup(acceptance: float, drafted: int, cost: float) -> float:
    """Theorem 3.8 of Leviathan et al.; cost: a step of the draft as a share of a step of the model.

    At γ = 1 it exceeds one exactly where the acceptance exceeds the cost.
    """
    return expected_tokens(acceptance, drafted) / (drafted * cost + 1)


@dataclass(frozen=True)
class Written:
    """What one run of `Speculation` wrote, and what became of its guesses."""

    tokens: Tensor  # [length], prompt included
    rounds: int
    kept: int  # drafted tokens that were kept
    tested: int  # drafted tokens that were looked at: those after the first rejected one are not

    @property
    def acceptance(self) -> float:
        """Share of the tested tokens that were kept."""
        return self.kept / max(1, self.tested)


class Speculation:
    """`model` writing one sequence of `length` tokens with `drafted` guesses of `draft` per pass; 0: plain decoding.

    Draft and model share tokenizer and device. temperature 0 is greedy decoding. A round of guesses and their check
    asks the host for nothing; on a GPU it is one CUDA graph. Raises ValueError as `require_static_cache`.
    """

    def __init__(self, model: nn.Module, draft: nn.Module | None, drafted: int, length: int, temperature: float = 1.0):
        for each in (model, draft) if drafted else (model,):
            require_static_cache(each)
        self.drafted, self.length, self.temperature, self.device = drafted, length, temperature, model.device
        self.vocabulary = model.config.get_text_config().vocab_size
        room = length + 4 * (drafted + 1)  # the last round may write beyond; a graph is run three times before
        self.model = Reader(model, 1, room)
        self.draft = Reader(draft, 1, room) if drafted else None
        self.tokens = torch.zeros(1, room, dtype=torch.long, device=self.device)
        self.known = torch.zeros((), dtype=torch.long, device=self.device)  # tokens written so far
        self.counts = torch.zeros(3, dtype=torch.long, device=self.device)  # rounds, kept, tested
        self.run = None

    def _distributions(self, logits: Tensor) -> Tensor:
        """Over the model's vocabulary; of a draft with another padding only the common rows count."""
        logits = logits[..., : self.vocabulary].float()
        if self.temperature == 0:
            p = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        else:
            p = (logits / self.temperature).softmax(-1)
        return F.pad(p, (0, self.vocabulary - p.shape[-1]))

    def _round(self) -> Tensor:
        last, q = self.known - 1, []
        reach = torch.arange(self.drafted + 1, device=self.device)
        block = self.tokens.index_select(1, last + reach * 0)  # the last token, γ + 1 times: room for the guesses
        # After a round in which all guesses were kept, the draft has not read the last of them: it reads two tokens.
        ids, at = self.tokens.index_select(1, last - 1 + torch.arange(2, device=self.device)), last - 1
        for i in range(self.drafted):
            q.append(self._distributions(self.draft(ids, at)[:, -1]))
            block[:, i + 1] = draw(q[-1])
            ids, at = block[:, i + 1 : i + 2], last + 1 + i
        p = self._distributions(self.model(block, last))
        guesses = block[:, 1:]
        q = torch.stack(q, 1) if q else p[:, :0]
        kept, following = accept(guesses, p, q)
        written = F.pad(guesses, (0, 1)).scatter(1, kept[:, None], following[:, None])
        self.tokens.index_copy_(1, self.known + reach, written)  # beyond `following`: overwritten by the next round
        self.known += kept[0] + 1
        self.counts += torch.stack((torch.ones_like(kept), kept, (kept + 1).clamp_max(self.drafted)))[:, 0]
        return self.known

    def _begin(self, prompt: Tensor) -> None:
        n = prompt.shape[1]
        start = torch.zeros((), dtype=torch.long, device=self.device)
        self.tokens[:, :n] = prompt
        for reader in (self.model, self.draft) if self.draft else (self.model,):
            reader(self.tokens[:, : n - 1], start, keep=1)
        self.known.fill_(n)
        self.counts.zero_()

    @torch.no_grad()
    def prepare(self, prompt: Tensor) -> None:
        """Read the prompt [1, n], n ≥ 2; the first time also record the round."""
        if not 2 <= prompt.shape[1] < self.length:
            raise ValueError(f"A prompt needs 2 to {self.length - 1} tokens, this one has {prompt.shape[1]}.")
        self._begin(prompt)
        if self.run is None:
            self.run = graphed(self._round, self.device)
            self._begin(prompt)  # recording has written something

    @torch.no_grad()
    def write(self) -> Written:
        """Go on from what `prepare` read until `length` tokens are there."""
        while self.run().item() < self.length:
            pass
        return Written(self.tokens[0, : self.length].cpu(), *self.counts.tolist())
