"""Knowledge distillation: a student made from its teacher, and the losses it learns with.

The loss (Hinton et al., 2015, arXiv:1503.02531), with p the teacher's and q the student's next-token distribution
and an index T for logits divided by the temperature:

    α · CE(labels, q)  +  (1 - α) · T² · KL(p_T ‖ q_T)

At high temperatures softening divides the gradient by T twice; T² gives it back, so that α means the same there.
"""

import copy
import math
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from common.measure.cuda_graph import using_attention
from common.methods.blocks import decoder_blocks
from common.methods.head_loss import common_rows, log_softmax
from common.methods.proofs import evaluating, few_tokens, require_same_from_configuration
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


def contiguous(blocks: int, keep: int) -> list[int]:
    """`keep` of `blocks` blocks without a run of neighbours before the last: deep layers change least, the last much.

    (Gromov et al., 2024, arXiv:2403.17887: the simple heuristic.)
    """
    return [*range(keep - 1), blocks - 1]


def narrow_student(teacher: nn.Module, width: int) -> nn.Module:
    """A copy of `teacher` whose hidden states have `width` channels: those whose embeddings vary most; in float32.

    Depth, heads and feed-forward widths stay, so attention can still be compared head by head (`minilm_loss`), hidden
    states only through a projection. Raises ValueError where the configuration does not describe the result.
    """
    config = copy.deepcopy(teacher.config)
    text, embeddings = config.get_text_config(), teacher.get_input_embeddings().weight
    if not 0 < width <= text.hidden_size:
        raise ValueError(f"width must lie between 1 and the teacher's {text.hidden_size}, got {width}.")
    text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    text.hidden_size = width
    kept = embeddings.detach().float().var(0).topk(width).indices.sort().values
    student = type(teacher)(config).to(teacher.device)
    large, small = teacher.state_dict(), student.state_dict()
    for name, target in small.items():
        source = large[name]
        for dim, (before, after) in enumerate(zip(source.shape, target.shape, strict=True)):
            source = source if before == after else source.index_select(dim, kept)
        target.copy_(source)
    require_same_from_configuration(student)
    return student.float().eval()


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T² · KL(p_T ‖ q_T), summed over tokens. Both logits are [tokens, vocabulary]; their common rows are compared."""
    log_q, log_p = (log_softmax(z, temperature) for z in common_rows(student_logits, teacher_logits))
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


class _Seen(Exception):
    """Ends a forward pass in an attention layer, with what the model called its attention with."""


def _look(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **others):
    raise _Seen(module, query, key, value, attention_mask, scaling, others)


# Every family hands its queries and keys to this interface after norms and rotary positions, with its own scaling,
# mask (a window, where attention slides) and soft cap.
AttentionInterface.register("look", _look)
AttentionMaskInterface.register("look", AttentionMaskInterface()["eager"])


def last_relations(model: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """MiniLM's two relations in the last block, as log-probabilities [batch, heads, seqlen, seqlen].

    hidden: what enters that block [batch, seqlen, hidden]. The first is its attention, the second the same of its
    values with themselves. Both are computed by the model's own attention. Raises ValueError where it cannot be seen.
    """
    module, query, key, value, mask, scaling, others = _last_attention(model, hidden)
    attend = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if attend is None or mask is None or mask.shape[-2:] != query.shape[-2:-1] + key.shape[-2:-1]:
        raise ValueError(_unseen(model))
    values = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)  # a head of values for each of queries
    with torch.autocast(hidden.device.type, enabled=False):
        query, key, value, values, mask = (tensor.float() for tensor in (query, key, value, values, mask))
        attention = attend(module, query, key, value, mask, scaling=scaling, dropout=0.0, **others)[1]
        relation = attend(module, values, value, value, mask, scaling=value.shape[-1] ** -0.5, dropout=0.0)[1]
    tiny = torch.finfo(torch.float32).tiny  # not 0: 0 · ∞ would be NaN in the divergence
    return attention.clamp_min(tiny).log(), relation.clamp_min(tiny).log()


def _last_attention(model: nn.Module, hidden: Tensor) -> tuple:
    """What the last block's attention is called with when `hidden` enters the block; the blocks before are skipped."""
    *before, last = decoder_blocks(model)
    ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)

    def enter(_, args, kwargs):
        return ((hidden, *args[1:]), kwargs) if args else ((), kwargs | {"hidden_states": hidden})

    handle = last.register_forward_pre_hook(enter, with_kwargs=True)
    for block in before:
        block.forward = lambda hidden_states, *_, **__: hidden_states
    try:
        with using_attention(model, "look"):
            model(input_ids=ids, use_cache=False)
    except _Seen as seen:
        return seen.args
    finally:
        handle.remove()
        for block in before:
            del block.forward
    raise ValueError(_unseen(model))


def _unseen(model: nn.Module) -> str:
    return (
        f"The last block of {type(model).__name__} does not show its attention (no softmax attention through "
        "transformers' attention interface), so MiniLM cannot compare it. Set minilm = 0, or choose another family."
    )


def require_relations(model: nn.Module) -> None:
    """Raise ValueError unless `last_relations` gives the attention that the model itself returns, on a few tokens."""
    ids = few_tokens(model)
    try:
        with evaluating(model), using_attention(model, "eager"):
            out = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_attentions=True)
            theirs, ours = out.attentions[-1].float(), last_relations(model, out.hidden_states[-2])[0].exp()
        difference, excess = (theirs - ours).abs().max(), (ours.sum(-1) - 1).abs().max()
    except Exception as error:  # whatever a family does otherwise
        raise ValueError(_unseen(model)) from error
    limit = max(1e-5, 4 * torch.finfo(out.attentions[-1].dtype).eps)  # of probabilities
    if not difference <= limit:
        raise ValueError(_unseen(model))
    if not excess <= limit:
        raise ValueError(
            f"The attention of {type(model).__name__} does not add up to one (attention sinks), so MiniLM's KL "
            "divergence means nothing for it. Set minilm = 0, or choose another family."
        )


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


def hidden_state_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of last hidden states [tokens, hidden], as a share of the teacher's mean square.

    Muralidharan et al., 2024, Minitron, arXiv:2407.14679 (there without the division, which makes it free of units).
    A narrower student's go through a trained projection first.
    """
    taught = teacher.float()
    return (student.float() - taught).square().mean() / taught.square().mean()
