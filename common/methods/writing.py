"""Text that the teacher writes itself: continuations of real openings, and turns of a chat.

Text sampled from the teacher is drawn from the distribution that its soft labels describe. Learning the sampled tokens
alone, as if they were the truth, is sequence-level distillation (Kim & Rush, 2016, arXiv:1606.07947).
"""

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm


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


@torch.no_grad()
def chat_windows(
    teacher: nn.Module,
    tokenizer,
    questions: list[str],
    seqlen: int,
    max_new_tokens: int,
    batch_size: int,
    seed: int = 0,
) -> Tensor:
    """The teacher's sampled answers in its own chat template, one exchange after the other: windows [n, seqlen].

    The tokens are those that it read and wrote; an answer ends where the teacher ended it, at the latest after
    `max_new_tokens`. Raises ValueError without a template, or where all exchanges together do not fill a window.
    """
    if not tokenizer.chat_template:
        raise ValueError("This tokenizer has no chat template: chats are for instruct models.")
    torch.manual_seed(seed)
    ends = teacher.generation_config.eos_token_id
    ends = torch.tensor([tokenizer.eos_token_id] if ends is None else ends).flatten()
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    stream = []
    for start in tqdm(range(0, len(chats), batch_size), desc="teacher answers", unit="batch"):
        prompts = [
            torch.tensor(tokenizer(c, add_special_tokens=False).input_ids) for c in chats[start : start + batch_size]
        ]
        longest = max(map(len, prompts))
        padding = [torch.zeros(longest - len(prompt), dtype=torch.long) for prompt in prompts]  # on the left
        ids = torch.stack([torch.cat(pair) for pair in zip(padding, prompts, strict=True)])
        mask = torch.stack([torch.arange(longest) >= len(pad) for pad in padding]).long()
        answers = teacher.generate(
            ids.to(teacher.device),
            attention_mask=mask.to(teacher.device),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max_new_tokens,
            pad_token_id=0,
        ).cpu()[:, longest:]
        for prompt, answer in zip(prompts, answers, strict=True):
            stops = torch.isin(answer, ends).nonzero().flatten()
            stream += [prompt, answer[: stops[0] + 1] if len(stops) else answer]
    tokens = torch.cat(stream)
    if len(tokens) < seqlen:
        raise ValueError(f"{len(questions)} exchanges gave {len(tokens)} tokens, less than a window of {seqlen}.")
    return tokens[: len(tokens) // seqlen * seqlen].view(-1, seqlen)
