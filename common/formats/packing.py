"""Codes of a few bits in 32-bit words, as the GPTQ and AWQ formats store them."""

import torch
from torch import Tensor

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack integers [n, columns] in [0, 2**bits) along dim 0 into int32 [n · bits / 32, columns].

    The codes form one stream of bits, lowest first, cut into 32-bit words; n must be a multiple of 32.
    """
    n, columns = codes.shape
    if n % WORD:
        raise ValueError(f"The GPTQ format packs layer sizes that are multiples of {WORD}, got {n}.")
    codes = codes.to(torch.int64).reshape(n // WORD, WORD, columns)  # 32 codes fill exactly `bits` words
    words = codes.new_zeros(n // WORD, bits, columns)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        words[:, word] |= codes[:, i] << shift
        if shift + bits > WORD:  # only 3-bit codes straddle two words
            words[:, word + 1] |= codes[:, i] >> (WORD - shift)
    return words.view(-1, columns).to(torch.int32)  # keeps the low 32 bits; bit 31 becomes the sign


def unpack_rows(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_rows`: uint8 [n, columns]."""
    words = packed.to(torch.int64) & 0xFFFFFFFF
    words = words.reshape(-1, bits, packed.shape[1])
    codes = []
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        code = words[:, word] >> shift
        if shift + bits > WORD:
            code = code | words[:, word + 1] << (WORD - shift)
        codes.append((code & (2**bits - 1)).to(torch.uint8))
    return torch.stack(codes, dim=1).view(-1, packed.shape[1])


def pack_outputs(codes: Tensor) -> Tensor:
    """Pack integers [n, out] in [0, 16) along the outputs into int32 [n, out / 8], in AWQ's order.

    out must be a multiple of 32.
    """
    reordered = codes.view(len(codes), -1, len(AWQ_ORDER))[..., list(AWQ_ORDER)].reshape(codes.shape)
    return pack_rows(reordered.T, bits=4).T.contiguous()


def unpack_outputs(packed: Tensor) -> Tensor:
    """The inverse of `pack_outputs`: uint8 [n, out]."""
    reordered = unpack_rows(packed.T.contiguous(), bits=4).T.reshape(len(packed), -1, len(AWQ_ORDER))
    codes = torch.empty_like(reordered)
    codes[..., list(AWQ_ORDER)] = reordered
    return codes.reshape(len(packed), -1)
