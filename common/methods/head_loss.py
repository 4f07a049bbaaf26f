"""Losses over a large vocabulary, with their gradients in closed form.

A batch's logits are by far its largest tensors (49,152 numbers a token). Both tricks here are about them:

- Their gradients are textbook formulas, "prediction - answer" and "student - teacher": written out, they take a few
  passes over the logits where autograd would take dozens.
- The loss is the last thing a network computes, so the gradient can be taken to the last layer's inputs and weights
  at once, some tokens at a time; logits of a whole batch then never exist (Liger Kernel, arXiv:2410.10989).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from common.methods.output_head import OutputHead

CHUNK = 2048  # tokens whose logits are held at once; changes memory, not the result

# Logits [tokens, vocabulary] and more, a row per token → loss summed over tokens, its gradient with the logits' shape.
LossAndGradient = Callable[..., tuple[Tensor, Tensor]]


def log_softmax(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature), in float32 or better: sums over a vocabulary need it."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if temperature != 1:
        logits = logits.to(dtype) / temperature
    return F.log_softmax(logits, dim=-1, dtype=dtype)


def common_rows(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both logits without what only one model has: models of one tokenizer pad their vocabularies differently."""
    rows = min(a.shape[-1], b.shape[-1])
    return a[..., :rows], b[..., :rows]


def cross_entropy_and_gradient(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy with labels [tokens]; its gradient is prediction - answer."""
    log_q, answers = log_softmax(logits), labels[:, None]
    loss = -log_q.gather(-1, answers).sum()
    gradient = log_q.exp_()
    return loss, gradient.scatter_add_(-1, answers, gradient.new_full(answers.shape, -1.0))


def kd_and_gradient(logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`common.methods.distillation.kd_loss`; its gradient is T · (student - teacher), 0 outside the common rows."""
    log_q, log_p = (log_softmax(z, temperature) for z in common_rows(logits, teacher_logits))
    loss = temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return loss, _padded(log_q.exp_().sub_(log_p.exp_()).mul_(temperature), logits)


def top_k_kd_and_gradient(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`common.methods.distillation.top_k_kd_loss`; its gradient is T · (student - teacher) of the stored tokens.

    Every other token gets its share of the same difference of the tails: q_j / q_tail.
    """
    log_q = log_softmax(logits, temperature)
    top = log_q.gather(-1, ids)
    others = log_q.exp_().scatter_(-1, ids, 0.0)
    tail = others.sum(-1, keepdim=True).clamp_min(torch.finfo(others.dtype).tiny)  # not 1 - Σ, which underflows
    log_outcomes = torch.cat((top, tail.log()), dim=-1)
    loss = temperature**2 * F.kl_div(log_outcomes, log_probs.to(log_q.dtype), log_target=True, reduction="sum")
    difference = temperature * (log_outcomes.exp() - log_probs.to(log_q.dtype).exp())
    gradient = others.mul_(difference[:, -1:] / tail)
    return loss, gradient.scatter_(-1, ids, difference[:, :-1])


def reverse_kd_and_gradient(logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """T² · KL(q_T ‖ p_T), summed over tokens, with its gradient: the expectation is the student's (mode-seeking)."""
    log_q, log_p = (log_softmax(z, temperature) for z in common_rows(logits, teacher_logits))
    q, slope = log_q.exp(), log_q - log_p
    return _through_softmax((q * slope).sum(-1), slope, q, logits, temperature)


def jensen_shannon_and_gradient(
    logits: Tensor, teacher_logits: Tensor, temperature: float, beta: float = 0.5
) -> tuple[Tensor, Tensor]:
    """T² · (β KL(p_T ‖ m) + (1 - β) KL(q_T ‖ m)), m = β p_T + (1 - β) q_T, summed over tokens, with its gradient.

    0 < β < 1. Divided by β it tends to the forward KL for β → 0, divided by 1 - β to the reverse for β → 1 (GKD,
    Agarwal et al., 2024, arXiv:2306.13649).
    """
    log_q, log_p = (log_softmax(z, temperature) for z in common_rows(logits, teacher_logits))
    q, log_m = log_q.exp(), torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    slope = (1 - beta) * (log_q - log_m)
    divergence = (q * slope).sum(-1) + beta * (log_p.exp() * (log_p - log_m)).sum(-1)
    return _through_softmax(divergence, slope, q, logits, temperature)


def _through_softmax(
    divergence: Tensor, slope: Tensor, q: Tensor, logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T² times a divergence [tokens], summed, and its gradient: q · (slope - ⟨slope⟩_q) · T for slope = ∂ / ∂q."""
    gradient = (slope - (q * slope).sum(-1, keepdim=True)).mul_(q).mul_(temperature)
    return temperature**2 * divergence.sum(), _padded(gradient, logits)


def _padded(gradient: Tensor, logits: Tensor) -> Tensor:
    """The gradient with zeros where only the student has rows (`common_rows`)."""
    outside = logits.shape[-1] - gradient.shape[-1]
    return F.pad(gradient, (0, outside)) if outside else gradient


# What a student may minimize where the teacher computes along; stored labels hold what the forward KL needs.
DIVERGENCES = {
    "forward": kd_and_gradient,
    "reverse": reverse_kd_and_gradient,
    "jensen-shannon": jensen_shannon_and_gradient,
}


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, loss_and_gradient, *per_token):
        wide = torch.promote_types(weight.dtype, torch.float32)
        total, to_hidden = 0.0, torch.empty_like(hidden)
        to_weight = torch.zeros_like(weight, dtype=wide) if ctx.needs_input_grad[1] else None
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=wide)
        chunks = zip(hidden.split(CHUNK), to_hidden.split(CHUNK), *(t.split(CHUNK) for t in per_token), strict=True)
        for inputs, to_inputs, *slices in chunks:
            logits = head(inputs)
            loss, gradient = loss_and_gradient(logits, *slices)
            gradient = head.before(gradient, logits).to(weight.dtype)
            torch.mm(gradient, weight, out=to_inputs)
            if to_weight is not None:
                to_weight += gradient.T @ inputs
            if to_bias is not None:
                to_bias += gradient.sum(0, dtype=wide)
            total = total + loss
        ctx.save_for_backward(to_hidden, to_weight, to_bias)
        ctx.others = len(per_token) + 2
        return total

    @staticmethod
    def backward(ctx, scale):
        to_hidden, *to_head = ctx.saved_tensors
        to_head = (None if gradient is None else gradient * scale for gradient in to_head)
        return to_hidden.to(scale.dtype) * scale, *to_head, *[None] * ctx.others  # autograd rounds them


def head_loss(hidden: Tensor, head: OutputHead, loss_and_gradient: LossAndGradient, *per_token: Tensor) -> Tensor:
    """Sum of `loss_and_gradient(head(hidden), *per_token)` over tokens, CHUNK of them at a time.

    hidden [tokens, hidden], of the type to compute in, as is the head; per_token: a row per token.
    """
    return _HeadLoss.apply(hidden, head.weight, head.bias, head, loss_and_gradient, *per_token)
