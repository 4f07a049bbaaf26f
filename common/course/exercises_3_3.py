"""What Lab 3.3's checks compare answers with, where that would give the answer away in the notebook."""

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def influence_of_blocks(hidden: list[Tensor]) -> Tensor:
    """Each block's influence [blocks] from the n + 1 hidden states [tokens, hidden] around n blocks."""
    return torch.stack([(1 - F.cosine_similarity(*pair, dim=-1)).mean() for pair in pairwise(hidden)])


def next_token_loss(logits: Tensor, ids: Tensor, real: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens that are real."""
    labels = torch.where(real, ids, -100)[:, 1:]
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), labels.flatten())


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean divergence of the value relations of values [heads, seqlen, d]."""
    log_q, log_p = (
        (torch.einsum("hid,hjd->hij", v, v) * v.shape[-1] ** -0.5).log_softmax(-1) for v in (student, teacher)
    )
    return F.kl_div(log_q, log_p, log_target=True, reduction="sum") / log_p[..., 0].numel()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """KL(p ‖ q), a mean over rows of logits."""
    return F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")


def training(
    inputs: Tensor, teacher: Tensor, weight: Tensor, batches: list[Tensor], lr: float
) -> tuple[Tensor, list[float]]:
    """A linear student's weight after SGD on the divergence from its teacher, and the loss before each step."""
    weight, losses = weight.double().clone().requires_grad_(True), []
    optimizer = torch.optim.SGD([weight], lr=lr)
    for rows in batches:
        optimizer.zero_grad()
        loss = divergence(teacher[rows].double(), inputs[rows].double() @ weight.T)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    return weight.detach(), losses


def ratio_and_interval(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The ratio of two perplexities, and the ends [2] of its paired 95 % interval."""
    half = 1.96 * (a - b).var().sqrt() / len(a) ** 0.5
    return a.mean().exp() / b.mean().exp(), ((a - b).mean() + torch.stack((-half, half))).exp()


def drawn(student: Tensor, before: Tensor, noise: Tensor) -> Tensor:
    """The tokens that the rule draws after the tokens `before`, both [batch, length]."""
    return (student.softmax(-1)[before].cumsum(-1) > noise[..., None]).int().argmax(-1)


def loss_patient(rng: torch.Generator, ill: bool) -> tuple[dict, float]:
    """A record of a mean loss, and what it should be."""
    losses, real = 2 + torch.rand(60, generator=rng), torch.rand(60, generator=rng) < 0.7
    losses[~real] = 9.0
    wanted = losses[real].mean().item()
    reported = losses.mean().item() if ill else wanted
    return {"kind": "loss", "losses": losses, "real": real, "reported": reported}, wanted


def labels_patient(rng: torch.Generator, ill: bool) -> tuple[dict, Tensor]:
    """A teacher's logits and the tokens, and the logits as they should be."""
    ids, logits = torch.randint(0, 30, (40,), generator=rng), torch.randn(40, 30, generator=rng)
    logits[torch.arange(40), ids if ill else ids.roll(-1)] += 2 * (torch.rand(40, generator=rng) < 0.8) + 1
    return {"kind": "labels", "teacher": logits, "ids": ids}, logits[1:] if ill else logits[:-1]
