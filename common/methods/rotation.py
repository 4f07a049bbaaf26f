"""Rotations that change no function and spread outliers over all channels (QuaRot, arXiv:2404.00456).

For an orthogonal Q, W x = (W Q)(Qᵀ x). RMSNorm without its weights commutes with Q, since Q keeps lengths; so the whole
residual stream can be turned (R1): what reads it is multiplied by Q, what writes to it by Qᵀ, and nothing is left to
compute at run time. A second one turns each head's values (R2), between v_proj and o_proj.
The price: the norms' weights go into the matrices after them, and a head that was tied to the embedding has weights of
its own from then on.
"""

import torch
from torch import Tensor, nn

from common.methods.capture import PROOF_TOKENS, decoder_blocks, same

INTO_ATTENTION = "q_proj", "k_proj", "v_proj"
INTO_FFN = "gate_proj", "up_proj"


def hadamard(n: int) -> Tensor | None:
    """A Hadamard matrix [n, n] of ±1 with orthogonal rows, float64; None where neither construction reaches n.

    Sylvester: of H, [[H, H], [H, -H]] is one. Paley: of a prime q ≡ 3 (mod 4) there is one of order q + 1. The
    Kronecker product of two is one: 576 = 12 · 12 · 4.
    """
    if n in (1, 2):
        return torch.ones(1, 1).double() if n == 1 else torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()
    for order in range(4, n + 1, 4):
        if n % order == 0 and _is_prime(order - 1) and (rest := hadamard(n // order)) is not None:
            return torch.kron(rest, _paley(order - 1))
    rest = hadamard(n // 2) if n % 2 == 0 else None
    return None if rest is None else torch.kron(hadamard(2), rest)


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % divisor for divisor in range(2, int(q**0.5) + 1))


def _paley(q: int) -> Tensor:
    """The Hadamard matrix of order q + 1 from the squares modulo q (Paley, 1933)."""
    squares = {i * i % q for i in range(1, q)}
    character = torch.tensor([0.0, *(1.0 if i in squares else -1.0 for i in range(1, q))], dtype=torch.float64)
    index = torch.arange(q)
    matrix = torch.ones(q + 1, q + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(index[:, None] - index) % q] + torch.eye(q)
    matrix[1:, 0] = -1
    return matrix


def random_rotation(n: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [n, n], float64: a Hadamard matrix with random signs, or any one where n has none here."""
    matrix = hadamard(n)
    if matrix is None:
        return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    signs = torch.randint(2, (n,), generator=generator).double() * 2 - 1
    return signs[:, None] * matrix / n**0.5


def _turn(linear: nn.Linear, before: Tensor | None = None, after: Tensor | None = None) -> None:
    """W ← afterᵀ · W · before, in float64, rounded once; a bias is an output too."""
    weight = linear.weight.double()
    weight = weight if before is None else weight @ before
    linear.weight.copy_(weight if after is None else after.T @ weight)
    if after is not None and linear.bias is not None:
        linear.bias.copy_(after.T @ linear.bias.double())


def _absorb(norm: nn.Module, readers: list[nn.Linear]) -> None:
    """Multiply a norm's weights into the layers that read it; the norm then only divides by the length."""
    for reader in readers:
        reader.weight.copy_(reader.weight.double() * norm.weight.double())
    norm.weight.fill_(1)


@torch.no_grad()
def rotate_model(
    model: nn.Module,
    seed: int = 0,
    *,
    residual: bool = True,
    heads: bool = True,
    width: int | None = None,
    device: str | torch.device | None = None,
) -> nn.Module:
    """Turn the residual stream (R1) and each head's values (R2) of a Llama-like model, in place.

    What the model computes stays, which is proven on a few tokens, up to rounding of its weights. A tied head is
    untied. width: turn so many neighbouring channels among themselves (default: all). device: where one block at a time
    is turned (default: where the model is). Raises ValueError where the model is not built like Llama (before the first
    change), or computes something else afterwards.
    """
    name, config = type(model).__name__, model.config.get_text_config()
    blocks, base = decoder_blocks(model), model.base_model
    for block in blocks:
        wanted = ("self_attn.o_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
        wanted += tuple(f"self_attn.{n}" for n in INTO_ATTENTION) + tuple(f"mlp.{n}" for n in INTO_FFN)
        modules = dict(block.named_modules())
        norms = [m for n, m in modules.items() if n.endswith("norm") and getattr(m, "weight", None) is not None]
        if not all(n in modules for n in wanted) or len(norms) != 2 or any(hasattr(m, "bias") for m in norms):
            raise ValueError(f"{name} cannot be rotated here: its blocks are not built like Llama's (two RMSNorms).")
    few = (torch.arange(1, PROOF_TOKENS + 1) * 7919 % config.vocab_size)[None].to(model.device)
    before = model(input_ids=few, use_cache=False).logits
    _untie(model)

    generator, home = torch.Generator().manual_seed(seed), model.device
    device = torch.device(device or home)
    width = width or config.hidden_size
    turn = torch.block_diag(*[random_rotation(width, generator)] * (config.hidden_size // width)).to(device)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if residual:
        embedding.weight.copy_(embedding.weight.to(device).double() @ turn)
        _absorb(base.norm, [head])
        head.weight.copy_(head.weight.to(device).double() @ turn)
    for block in blocks:
        block.to(device)
        attention, ffn = block.self_attn, block.mlp
        if heads:
            _turn_values(attention, random_rotation(attention.head_dim, generator).to(device))
        if residual:
            into = [getattr(attention, n) for n in INTO_ATTENTION], [getattr(ffn, n) for n in INTO_FFN]
            for norm, readers in zip((block.input_layernorm, block.post_attention_layernorm), into, strict=True):
                _absorb(norm, readers)
                for reader in readers:
                    _turn(reader, before=turn)
            for writer in (attention.o_proj, ffn.down_proj):
                _turn(writer, after=turn)
        block.to(home)
    after = model(input_ids=few, use_cache=False).logits
    if not same(after, before):
        raise ValueError(f"The rotation has changed what {name} computes: load the model again, and do without.")
    return model


def _turn_values(attention: nn.Module, turn: Tensor) -> None:
    """v_proj's rows of each key-value head, and o_proj's columns of each query head that reads it."""
    v, o = attention.v_proj, attention.o_proj
    _turn(v, after=torch.block_diag(*[turn] * (v.out_features // len(turn))))
    _turn(o, before=torch.block_diag(*[turn] * (o.in_features // len(turn))))


def _untie(model: nn.Module) -> None:
    """Give the head weights of its own: embedding and head are turned alike, but only the head takes up a norm."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
