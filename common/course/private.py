"""The private names of libraries that the course relies on, each with its reason; no other module uses one.

`tests/course/test_private.py` holds each to what is relied on, and fails when a library changes it.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def attention_of(config) -> str:
    """How a model with this configuration of transformers computes attention, such as "sdpa".

    `set_attn_implementation` is public, and asks nothing back.
    """
    return config._attn_implementation


def set_attention(config, implementation: str) -> None:
    """Let models made from this configuration compute attention so, also by a function that is registered only here.

    Models have a public method for it; configurations, of which a model is yet to be made, have none.
    """
    config._attn_implementation = implementation


def int4_product(codes: Tensor) -> tuple[Tensor, Callable[[Tensor, Tensor, int, Tensor], Tensor]]:
    """PyTorch's 4-bit product of a matrix (tinygemm), which torchao, too, calls by its private name.

    codes: uint8 [out, in], each below 16. Returns them in the layout of their device, and product(x, codes, group size,
    scale and offset [groups, out, 2]), which takes a code for (code - 8) · scale + offset.
    """
    if codes.is_cuda:
        pairs = codes[:, ::2] << 4 | codes[:, 1::2]  # even columns in the high half of a byte
        tiles = next(tiles for tiles in (8, 4, 2) if codes.shape[1] % (16 * tiles) == 0)  # of 16 inputs, in one tile
        return torch._convert_weight_to_int4pack(pairs.contiguous(), tiles), torch._weight_int4pack_mm
    return torch._convert_weight_to_int4pack_for_cpu(codes.int(), 1), torch._weight_int4pack_mm_for_cpu


def compress_2_4(weight: Tensor) -> Tensor:
    """A 2:4 weight [out, in] on a GPU as cuSPARSELt keeps it: the values that stay, and two bits of place for each."""
    return torch._cslt_compress(weight)


def product_2_4(packed: Tensor, columns: Tensor, algorithm: int = 0, transpose_result: bool = False) -> Tensor:
    """W [out, in], compressed, times columns [in, tokens]: [out, tokens], or written as [tokens, out]; both in rows.

    `torch.sparse.to_sparse_semi_structured` is public and chooses all of this by itself, differently by version.
    """
    return torch._cslt_sparse_mm(packed, columns, transpose_result=transpose_result, alg_id=algorithm)


def fastest_2_4(packed: Tensor, columns: Tensor, transpose_result: bool = False) -> int:
    """The number of the algorithm with which cuSPARSELt computes `product_2_4` fastest; it tries them all."""
    return torch._cslt_sparse_mm_search(packed, columns, transpose_result=transpose_result)


def add_to_catalogue(words: dict[str, str]) -> None:
    """Give Sphinx translations that its catalogue of the language lacks."""
    from sphinx.locale import get_translator

    get_translator("sphinx")._catalog.update(words)
