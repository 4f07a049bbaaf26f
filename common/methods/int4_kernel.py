"""Products of a 4-bit matrix with up to 64 tokens, short enough to read: what makes four bits fast is few instructions.

A decoding step reads every weight once and should take as long as that. With a quarter of the bytes it no longer does:
turning codes into numbers takes longer than reading them. The plain way is five instructions per weight: shift, mask,
convert, subtract the zero point, multiply by the scale. Three things spare most of them:

- **No conversion.** The smallest floats are evenly spaced: the bits of an integer below 2^8, read as a bfloat16, are
  the number integer · 2^-133 (below 2^24, as a float32: integer · 2^-149). So a masked code is a number where it stands
  in its word; the factor of its place is multiplied out together with the zero point, in one multiply-add.
- **No scale for each weight.** Within a group Σ scale · (code - zero) · x = scale · Σ (code - zero) · x.
- **Tensor cores.** A tile of numbers in registers is what `tl.dot` takes; the tokens are its other side. A sum does not
  care for its order, so the codes of one place make a tile of their own and never have to be sorted.

The same as Marlin does in CUDA (Frantar et al., arXiv:2408.11743). Triton compiles on a GPU; on a CPU it interprets
(TRITON_INTERPRET=1), in float32, for tests.
"""

from functools import cache

import torch
import triton
import triton.language as tl

MOST_TOKENS = 64  # the sums of twice as many no longer fit the registers
ROWS = 64  # outputs of a program


@triton.jit
def _number(half, kind: tl.constexpr):
    """The lower 16 bits of integers, read as bfloat16; `kind` is float32 where Triton interprets."""
    if kind == tl.bfloat16:
        return half.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:  # the same number: a bfloat16 is the upper half of a float32
        return (half << 16).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "outputs", "groups"])
def int4_gemm(
    x, words, scale, zero, out, sums, arrived, tokens, outputs, groups,
    ROWS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """ROWS outputs of up to TOKENS tokens; programs of one row of the grid share out the groups of 128 columns."""
    kind: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    token = tl.arange(0, TOKENS)[None, :]
    here, lane = token < tokens, tl.arange(0, 16)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for group in range(tl.program_id(1), groups, tl.num_programs(1)):
        word = tl.load(words + (row * groups + group) * 16 + lane[None, :])  # 16 words of a row are a group
        origin = tl.load(zero + row * groups + group).to(kind) * -0.015625  # the zero point · -2^-6
        inputs = x + token * (groups * 128) + group * 128 + lane[:, None]
        part = tl.zeros((ROWS, TOKENS), tl.float32)
        for place in tl.static_range(4):  # two codes of a word at once, one in each half: places 0 and 4, 1 and 5, …
            codes = (word >> 8 * (place // 2)) & (0x000F000F << 4 * (place % 2))  # · 16^(place % 2) 2^-133
            low = _number(codes, kind) * (2.0 ** (127 - 4 * (place % 2))) + origin  # (code - zero) · 2^-6, exactly
            high = _number(codes >> 16, kind) * (2.0 ** (127 - 4 * (place % 2))) + origin
            part = tl.dot(low, tl.load(inputs + 16 * place, mask=here, other=0), part)
            part = tl.dot(high, tl.load(inputs + 16 * (place + 4), mask=here, other=0), part)
        total += tl.load(scale + row * groups + group).to(tl.float32) * part
    at = row + token * outputs
    total *= 64
    tl.atomic_add(sums + at, total, mask=here, sem="relaxed")
    tl.debug_barrier()  # the last to arrive writes what all have added up, and leaves zeros for the next product
    if tl.atomic_add(arrived + tl.program_id(0), 1, sem="acq_rel") == tl.num_programs(1) - 1:
        tl.store(out + at, tl.load(sums + at, mask=here).to(out.dtype.element_ty), mask=here)
        tl.store(sums + at, tl.zeros((ROWS, TOKENS), tl.float32), mask=here)
        tl.store(arrived + tl.program_id(0), 0)


@triton.jit
def _sum_of_fours(tile):
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 4, 4)), 2)


@triton.jit
def int4_gemv(x, words, scale, zero, out, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """One token: ROWS outputs, each from a row of WIDTH words, CHUNK of them at a time, without tensor cores.

    A tile of 16 tokens would be empty but for one. Six codes are numbers where they stand in the 24 bits of a float32.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    total = tl.zeros((ROWS, CHUNK // 4), tl.float32)
    for start in range(0, WIDTH, CHUNK):
        at = start + tl.arange(0, CHUNK)[None, :]
        word = tl.load(words + rows * WIDTH + at, mask=at < WIDTH, other=0)
        column = at // 16 * 128 + at % 16  # of the lowest code; the next one is 16 columns further
        products = tl.zeros((ROWS, CHUNK), tl.float32)
        inputs = tl.zeros((1, CHUNK), tl.float32)
        for place in tl.static_range(8):
            value = tl.load(x + column + 16 * place, mask=at < WIDTH, other=0).to(tl.float32)
            inputs += value
            if place == 6:  # the other 24 bits are done
                word = (word >> 24) & 255
            tiny = (word & (15 << 4 * (place % 6))).to(tl.float32, bitcast=True)  # code · 16^place · 2^-149
            products += tiny * (value * (2.0**100 / 16 ** (place % 6)))
        fours = start // 4 + tl.arange(0, CHUNK // 4)[None, :]  # a group is 16 words: four are surely of one
        group = rows * (WIDTH // 16) + fours // 4
        steps = tl.load(scale + group, mask=fours < WIDTH // 4, other=0).to(tl.float32)
        origin = tl.load(zero + group, mask=fours < WIDTH // 4, other=0).to(tl.float32)
        total += steps * (_sum_of_fours(products) * 2.0**49 - origin * _sum_of_fours(inputs))
    tl.store(out + rows, tl.sum(total, 1, keep_dims=True).to(out.dtype.element_ty))


@cache
def _workspace(device: torch.device, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums and counters that are zero between products, shared by all products of this size on one stream."""
    sums = torch.zeros(MOST_TOKENS, outputs, device=device)
    return sums, torch.zeros(-(-outputs // 16), dtype=torch.int32, device=device)


def product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """x @ weight.T for x [tokens ≤ 64, in], with weight [out, in] = scale · (code - zero) in groups of 128 columns.

    words: int32 [out, in / 8] as `int4.pack_words` makes them; scale: float, zero: uint8, both [out, in / 128].
    Returns [tokens, out] in the type of x: bfloat16 (below 2^27), or float32 in Triton's interpreter. ValueError where
    the kernel does not fit. The constants were the fastest on an H200 of those tried.
    """
    tokens, outputs, groups = len(x), len(words), scale.shape[1]
    if tokens > MOST_TOKENS or outputs % ROWS or (x.is_cuda and x.dtype != torch.bfloat16):
        raise ValueError(
            f"The kernel multiplies up to {MOST_TOKENS} tokens in bfloat16 with a multiple of {ROWS} outputs, "
            f"not {tokens} in {x.dtype} with {outputs}."
        )
    out = x.new_empty(tokens, outputs)
    if tokens == 1:
        int4_gemv[(outputs // 8,)](x, words, scale, zero, out, words.shape[1], ROWS=8, CHUNK=512, num_warps=4)
        return out
    split = 4 if outputs > 8192 or tokens > 32 else 8  # of few rows there are too few programs for the card
    int4_gemm[(outputs // ROWS, split)](
        x, words, scale, zero, out, *_workspace(x.device, outputs), tokens, outputs, groups,
        ROWS=ROWS, TOKENS=max(16, triton.next_power_of_2(tokens)), num_warps=4, num_stages=3,
    )  # fmt: skip
    return out
