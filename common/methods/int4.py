"""Linear layers whose weights stay packed in four bits while they are multiplied: of each, half a byte is read."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.course.private import int4_product
from common.methods.blocks import iter_linears
from common.methods.quantization import QuantizeConfig, QuantizedWeight, rtn


def pack_words(codes: Tensor) -> Tensor:
    """4-bit codes [out, in] as int32 words [out, in / 8]; the eight codes of a word are 16 columns apart.

    So the words of a row lie side by side, and so do the inputs that meet their codes of one place: both are read fast.
    """
    places = codes.int().unflatten(1, (-1, 8, 16)).unbind(2)
    return sum(part << 4 * place for place, part in enumerate(places)).flatten(1).contiguous()


def unpack_words(words: Tensor) -> Tensor:
    """The codes [out, in] that `pack_words` was given."""
    places = [(words.unflatten(1, (-1, 16)) >> 4 * place) & 15 for place in range(8)]
    return torch.stack(places, dim=2).flatten(1)


class Int4Linear(nn.Module):
    """A layer of 4-bit weights in groups of 128: few tokens by the course's kernel, many by the dequantized matrix.

    On a CPU always by the dequantized matrix: Triton, in which the kernel is written, is for GPUs. ValueError where the
    weight has other bits or groups.
    """

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.config = weight.config
        if (self.config.bits, self.config.group_size) != (4, 128):
            raise ValueError(f"The kernel is for 4 bits in groups of 128, not {self.config}.")
        self.register_buffer("words", pack_words(weight.codes))
        self.register_buffer("scale", weight.scale.contiguous())
        self.register_buffer("zero", weight.zero.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if x.is_cuda:
            from common.methods import int4_kernel  # without a GPU, there is no Triton

            if len(rows) <= int4_kernel.MOST_TOKENS:
                return int4_kernel.product(rows, self.words, self.scale, self.zero).view(*x.shape[:-1], -1)
        return F.linear(x, self.dequantize().to(x.dtype))

    def dequantize(self) -> Tensor:
        """The float32 matrix [out, in]."""
        return QuantizedWeight(unpack_words(self.words), self.scale, self.zero, self.config).dequantize()


class TorchInt4(nn.Module):
    """The same by PyTorch's own 4-bit product (tinygemm): weight = scale · (code - 8) + offset."""

    def __init__(self, weight: QuantizedWeight, dtype: torch.dtype, bias: Tensor | None = None):
        super().__init__()
        self.register_buffer("bias", bias)
        scale = weight.scale.T.float()
        offset = (8 - weight.zero.T.float()) * scale
        self.register_buffer("scale_and_offset", torch.stack([scale, offset], dim=-1).to(dtype))  # [groups, out, 2]
        self.group, self.out_features = weight.config.group_size, len(weight.codes)
        codes, self.product = int4_product(weight.codes)
        self.register_buffer("codes", codes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.product(x.reshape(-1, x.shape[-1]), self.codes, self.group, self.scale_and_offset)
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.out_features)


def use_torch_int4(model: nn.Module, config: QuantizeConfig, device: torch.device) -> nn.Module:
    """`model` on `device`, its blocks' linear layers rounded to nearest and multiplied by PyTorch's 4-bit product.

    For timing: which codes a weight gets has no influence on it. One layer at a time is on the device in full.
    """
    for name, linear in list(iter_linears(model)):
        if isinstance(linear, nn.Linear):
            weight = rtn(linear.weight.detach().to(device), config)
            model.set_submodule(name, TorchInt4(weight, linear.weight.dtype, linear.bias))
    return model.to(device)
