"""A product of a 4-bit matrix with one token, short enough to read: what makes four bits fast is few instructions.

At batch 1 a product reads every weight once and should take as long as that. With a quarter of the bytes it no longer
does: on an H100, turning codes into numbers takes longer than reading them. The plain way is five instructions per
weight: shift, mask, convert, subtract, multiply and add. This kernel takes two, mask and multiply-add:

- **No conversion.** The bits of an integer below 2^24, read as those of a float32, are the number integer · 2^-149: the
  smallest floats are evenly spaced. So a code that was masked can be multiplied where it stands in its word, six of
  them in 24 bits; the factor of its place is taken out of the input, once for all rows. (A GPU multiplies such numbers
  at full speed, and Triton compiles without flushing them to zero.)
- **No subtraction.** Σ scale · (code - zero) · x = scale · (Σ code · x - zero · Σ x), and Σ x is the same for all rows.

For prompts and larger batches tensor cores are the better tool, as in Marlin (Frantar et al., arXiv:2408.11743).
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _sum_of_fours(tile):
    return tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 4, 4)), 2)


@triton.jit
def int4_gemv(x, words, scale, zero, out, WIDTH: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr):
    """ROWS outputs, each from a row of WIDTH words, CHUNK of them at a time."""
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


def product(x: torch.Tensor, words: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """weight @ x for one token x [in], with weight = scale · (code - zero) in groups of 128 columns.

    words: int32 [out, in / 8] as `benchmarks.decode_kernels.pack_words` makes them; scale, zero: float [out, in / 128];
    out must be a multiple of 8. Inputs above 2^27 overflow. Returns [out] in the type of x.
    """
    out = x.new_empty(len(words))
    int4_gemv[(len(words) // 8,)](x, words, scale, zero, out, words.shape[1], ROWS=8, CHUNK=512, num_warps=4)
    return out
