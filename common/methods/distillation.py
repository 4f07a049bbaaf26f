"""Knowledge distillation: a student made from its teacher, the losses it learns with, and text the teacher writes.

The loss (Hinton et al., 2015, arXiv:1503.02531), with p the teacher's and q the student's next-token distribution
and an index T for logits divided by the temperature:

    α · CE(labels, q)  +  (1 - α) · T² · KL(p_T ‖ q_T)

At high temperatures softening divides the gradient by T twice; T² gives it back, so that α means the same there.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from common.methods.blocks import decoder_blocks
from common.methods.head_loss import log_softmax
from common.methods.structured import drop_blocks


def check_tokenizers(teacher, student) -> None:
    """Raise ValueError unless both tokenizers give every token the same id: distributions are compared id by id."""
    a, b = teacher.get_vocab(), student.get_vocab()
    if a != b:
        different = sum(a.get(token) != b.get(token) for token in a.keys() | b.keys())
        raise ValueError(
            f"Teacher and student have different tokenizers ({different:,} tokens differ in id or existence), so their "
            "distributions cannot be compared. Choose a student with the teacher's tokenizer, such as TinyLlama-1.1B "
            'for Llama-2-7B, or STUDENT = "layers".'
        )


def most_influential(influence: list[float], keep: int) -> list[int]:
    """The `keep` blocks with the largest influence (`common.methods.structured.block_influence`), in order."""
    return sorted(sorted(range(len(influence)), key=influence.__getitem__, reverse=True)[:keep])


def evenly_spaced(blocks: int, keep: int) -> list[int]:
    """`keep` of `blocks` blocks, evenly spaced from the first to the last."""
    return [round(i * (blocks - 1) / (keep - 1)) for i in range(keep)] if keep > 1 else [0]


def student_from_teacher(teacher: nn.Module, keep: list[int]) -> nn.Module:
    """A copy of `teacher` with only the blocks `keep`, in float32 for training."""
    blocks = range(len(decoder_blocks(teacher)))
    if not keep or not set(keep) <= set(blocks):
        raise ValueError(f"The student needs blocks from 0 to {blocks[-1]}, got {keep}.")
    student = drop_blocks(teacher, [index for index in blocks if index not in keep])
    return student.float().requires_grad_(True)


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(p_T ‖ q_T), summed over tokens. Both logits are [tokens, vocabulary]."""
    log_q = log_softmax(student_logits, temperature)
    log_p = log_softmax(teacher_logits, temperature)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="sum")


def top_k_kd_loss(student_logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """T² · KL between k + 1 outcomes, summed over tokens: the teacher's k likeliest tokens, and "any other".

    student_logits [tokens, vocabulary]; ids [tokens, k]; log_probs [tokens, k + 1] at the same temperature, the last
    one of all other tokens together. Merging outcomes can only lower a KL divergence (data-processing inequality).
    """
    log_q = log_softmax(student_logits, temperature)
    other = log_q.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    outcomes = torch.cat((log_q.gather(-1, ids), other), dim=-1)
    return temperature**2 * F.kl_div(outcomes, log_probs, log_target=True, reduction="sum")


def distillation_loss(cross_entropy: Tensor, divergence: Tensor, alpha: float) -> Tensor:
    """α · CE + (1 - α) · T² · KL, of two losses over the same tokens."""
    return alpha * cross_entropy + (1 - alpha) * divergence


def last_relations(model: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """MiniLM's two relations in the last block, as log-probabilities [batch, heads, seqlen, seqlen].

    hidden: what enters that block [batch, seqlen, hidden]. The first is its attention, the second the same of its
    values with themselves. For attention of Llama's kind: rotary positions, grouped keys and values repeated.
    """
    block = decoder_blocks(model)[-1]
    attention, hidden = block.self_attn, block.input_layernorm(hidden)
    batch, seqlen, _ = hidden.shape
    project = (attention.q_proj, attention.k_proj, attention.v_proj)
    q, k, v = (p(hidden).view(batch, seqlen, -1, attention.head_dim).transpose(1, 2) for p in project)
    positions = torch.arange(seqlen, device=hidden.device)[None]
    q, k = apply_rotary_pos_emb(q, k, *model.base_model.rotary_emb(v, positions))
    groups = q.shape[1] // k.shape[1]
    k, v = repeat_kv(k, groups), repeat_kv(v, groups)
    return _relation(q, k), _relation(v, v)


def _relation(a: Tensor, b: Tensor) -> Tensor:
    """log softmax(a·bᵀ / √d) over the tokens up to one's own: a, b [batch, heads, seqlen, d]."""
    scores = (a @ b.transpose(-1, -2)).float() / math.sqrt(a.shape[-1])
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(later, -1e9).log_softmax(-1)  # not -inf: 0 · ∞ would be NaN in the divergence


def minilm_loss(student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> Tensor:
    """KL of the last block's attention plus KL of its value relations (of `last_relations`), mean over heads/tokens.

    Wang et al., 2020, MiniLM, arXiv:2002.10957. Works across widths; raises ValueError when head counts differ.
    """
    if student[0].shape != teacher[0].shape:
        heads = student[0].shape[1], teacher[0].shape[1]
        raise ValueError(f"MiniLM compares heads one to one: the student has {heads[0]}, the teacher {heads[1]}.")
    rows = student[0][..., 0].numel()
    divergences = (F.kl_div(q, p, log_target=True, reduction="sum") for q, p in zip(student, teacher, strict=True))
    return sum(divergences) / rows


@torch.no_grad()
def continuations(
    teacher: nn.Module, prompts: Tensor, seqlen: int, batch_size: int, temperature: float = 1.0, seed: int = 0
) -> Tensor:
    """What the teacher writes after each prompt [n, prompt tokens], sampled: windows [n, seqlen], prompt included."""
    torch.manual_seed(seed)
    pieces = []
    for batch in tqdm(prompts.split(batch_size), desc="teacher writes", unit="batch"):
        new = seqlen - batch.shape[1]
        pieces.append(
            teacher.generate(
                batch.to(teacher.device),
                attention_mask=torch.ones_like(batch, device=teacher.device),
                do_sample=True,
                temperature=temperature,
                top_k=0,
                top_p=1.0,
                max_new_tokens=new,
                min_new_tokens=new,  # windows are full: it may not end its text early
                pad_token_id=0,
            ).cpu()
        )
    return torch.cat(pieces)
