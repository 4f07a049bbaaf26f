"""A Llama of a published shape with its matrix products handed to one kernel or another, for timing a decoding step.

Only the matrix products differ between kernels; the rest is the same for all and takes as few kernels as it can:
projections that read the same input are stacked into one matrix, what lies between products is compiled, and the
last position of a full cache attends to everything, so attention needs no mask. The plain Hugging Face layer launches
some 45 small kernels a block besides its products; a 4-bit model reads its weights in less time than those take.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.formats.gptq import pack_linear
from common.methods.int4 import Int4Linear, TorchInt4
from common.methods.quantization import QuantizeConfig, rtn

# Symmetric, as Marlin wants it. Which codes a weight gets has no influence on speed: rounding will do.
CONFIG = QuantizeConfig(bits=4, group_size=128, sym=True, mse=False, desc_act=False)


# --- a layer with few kernels ----------------------------------------------------------------------------------------


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _add_norm(x: Tensor, change: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x + change
    return x, _norm(x, weight, eps)


def _store(
    qkv: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, positions: Tensor, heads: int
) -> Tensor:
    """Split [batch, tokens, width], turn query and key to their positions, and put key and value into the cache.

    keys, values: the cache [batch, kv_heads, length, head], changed in place; returns the query [batch, heads, tokens,
    head].
    """
    kv_heads = keys.shape[1]
    qkv = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).transpose(1, 2)
    turned, value = qkv.split([heads + kv_heads, kv_heads], dim=1)
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos[:, None] + torch.cat((-second, first), dim=-1) * sin[:, None]
    query, key = turned.split([heads, kv_heads], dim=1)
    keys[:, :, positions] = key
    values[:, :, positions] = value
    return query


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


_compiled = functools.cache(torch.compile)


def stack(*linears: nn.Linear) -> nn.Linear:
    """One layer with the outputs of several that read the same input, side by side."""
    weight = torch.cat([linear.weight.detach() for linear in linears])
    stacked = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    stacked.weight = nn.Parameter(weight, requires_grad=False)
    return stacked


class LeanLayer(nn.Module):
    """A `LlamaDecoderLayer` in few kernels, its matrix products by `convert`.

    Serves what `common.measure.benchmarking.Decoder` does: a prompt from position 0, then the token at the cache's end.
    """

    def __init__(self, layer: nn.Module, convert: Callable[[nn.Linear], nn.Module]):
        super().__init__()
        attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
        self.index, self.eps = attention.layer_idx, config.rms_norm_eps
        self.last = self.index == config.num_hidden_layers - 1
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head = attention.head_dim
        self.before_attention = layer.input_layernorm.weight
        self.before_mlp = layer.post_attention_layernorm.weight
        self.qkv = convert(stack(attention.q_proj, attention.k_proj, attention.v_proj))
        self.out = convert(attention.o_proj)
        self.gate_up = convert(stack(mlp.gate_proj, mlp.up_proj))
        self.down = convert(mlp.down_proj)

    def forward(self, hidden, position_embeddings, position_ids: Tensor, past_key_values, **_):
        """hidden: [batch, tokens, width] for the first layer; between layers a pair of what is still to be added up.

        The sum is taken together with the norm that follows it, in one kernel instead of two.
        """
        before, change = hidden if isinstance(hidden, tuple) else (hidden, torch.zeros_like(hidden))
        one = before.shape[1] == 1
        fused = _compiled if one and before.is_cuda else lambda function: function
        hidden, normed = fused(_add_norm)(before, change, self.before_attention, self.eps)
        qkv = self.qkv(normed)
        cache = past_key_values.layers[self.index]
        if not cache.is_initialized:
            like = qkv.new_empty(len(qkv), self.kv_heads, 1, self.head)
            cache.lazy_initialization(like, like)
        query = fused(_store)(qkv, *position_embeddings, cache.keys, cache.values, position_ids[0], self.heads)
        length = cache.keys.shape[2] if one else before.shape[1]
        key, value = cache.keys[:, :, :length], cache.values[:, :, :length]
        grouped = self.heads != self.kv_heads
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=not one, enable_gqa=grouped)
        change = self.out(mixed.transpose(1, 2).flatten(2))
        hidden, normed = fused(_add_norm)(hidden, change, self.before_mlp, self.eps)
        change = self.down(fused(_gate)(self.gate_up(normed)))
        return hidden + change if self.last else (hidden, change)


# --- kernels ---------------------------------------------------------------------------------------------------------


def torch_int4(linear: nn.Linear) -> nn.Module:
    return TorchInt4(rtn(linear.weight.detach(), CONFIG), linear.weight.dtype)


def course_int4(linear: nn.Linear) -> nn.Module:
    return Int4Linear(rtn(linear.weight.detach(), CONFIG))


class BnbNF4(nn.Module):
    """bitsandbytes' NF4 in blocks of 64 with float32 scales: what `Linear4bit` computes."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        import bitsandbytes

        weight = linear.weight.detach()
        packed, self.state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("scales", self.state.absmax)
        self.product = bitsandbytes.matmul_4bit

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.packed, quant_state=self.state)


class BnbInt8(nn.Module):
    """bitsandbytes' INT8: what `Linear8bitLt` computes without its split of outliers, which waits for the CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        import bitsandbytes

        self.quantize = bitsandbytes.functional.int8_vectorwise_quant
        codes, scales, _ = self.quantize(linear.weight.detach().half())
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        codes, scales, _ = self.quantize(x.reshape(-1, x.shape[-1]).half())
        out = torch.ops.bitsandbytes.int8_scaled_mm.default(codes, self.codes, scales, self.scales, dtype=x.dtype)
        return out.view(*x.shape[:-1], -1)


def gptqmodel_layer(linear: nn.Linear, module: str, name: str) -> nn.Module:
    """One of GPTQModel's layers with 4-bit codes in it; `gptqmodel_finish` makes it ready."""
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

    kernel = getattr(importlib.import_module(f"gptqmodel.nn_modules.qlinear.{module}"), name)
    options = {"bits": CONFIG.bits, "group_size": CONFIG.group_size, "sym": CONFIG.sym, "desc_act": CONFIG.desc_act}
    with torch.device(linear.weight.device):
        layer = kernel(**options, in_features=linear.in_features, out_features=linear.out_features)
    with torch.no_grad():
        for key, tensor in pack_linear(rtn(linear.weight.detach(), CONFIG)).items():
            getattr(layer, key).copy_(tensor)
    if kernel.REQUIRES_FORMAT_V2:
        convert_gptq_v1_to_v2_format_module(layer, bits=CONFIG.bits, pack_dtype=torch.int32)
    return layer.eval()


def gptqmodel_finish(model: nn.Module) -> None:
    """Let every layer of GPTQModel bring its weights into its kernel's order."""
    from gptqmodel.utils.model import gptqmodel_post_init

    gptqmodel_post_init(model, use_act_order=False)


@dataclass(frozen=True)
class Kernel:
    """How to convert a linear layer, the type of the activations its kernel is made for, and where it runs."""

    convert: Callable[[nn.Linear], nn.Module]
    dtype: torch.dtype = torch.bfloat16
    finish: Callable[[nn.Module], None] = lambda model: None  # called once all layers are converted
    gpu_only: bool = False
    most: float = float("inf")  # the largest batch it is made for
    extension: str = ""  # what GPTQModel has to compile for it


def _gptq(module: str, name: str, extension: str = "") -> Kernel:
    convert = functools.partial(gptqmodel_layer, module=module, name=name)
    return Kernel(convert, torch.float16, gptqmodel_finish, gpu_only=True, extension=extension)


KERNELS = {
    "original": Kernel(lambda linear: linear),
    "torch-int4": Kernel(torch_int4),
    "triton-int4": Kernel(course_int4, gpu_only=True, most=64),
    "bnb-nf4": Kernel(BnbNF4),
    "bnb-int8": Kernel(BnbInt8, torch.float16),
    "gptq-triton": _gptq("tritonv2", "TritonV2Linear"),
    "gptq-exllama_v2": _gptq("exllamav2", "ExllamaV2Linear", "exllamav2"),
    "gptq-marlin": _gptq("marlin", "MarlinLinear", "marlin_fp16"),
}


@torch.no_grad()
def use_kernel(model: nn.Module, kernel: Kernel) -> float:
    """Replace the decoder layers of a Llama by lean ones with `kernel`, in place.

    Returns the relative error that the kernel makes at the output of the first block's last product.
    """
    layers = model.model.layers
    down = layers[0].mlp.down_proj
    x = torch.randn(1, 1, down.in_features, device=down.weight.device, dtype=down.weight.dtype)
    expected = down(x).float()
    for index, layer in enumerate(layers):
        layers[index] = LeanLayer(layer, kernel.convert)
    kernel.finish(model)
    return ((layers[0].down(x).float() - expected).norm() / expected.norm()).item()


# --- what a step must read -------------------------------------------------------------------------------------------


def bytes_of_weights(model: nn.Module) -> int:
    """Bytes of all parameters and buffers: the weights as the kernel keeps them, scales included."""
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def bytes_per_step(model: nn.Module, batch: int, context: int) -> int:
    """Bytes that one decoding step has to read: the weights (of an untied embedding only a row), keys and values.

    context: tokens in the cache, the new one included.
    """
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * head * context * batch * model.dtype.itemsize
    embedding = model.get_input_embeddings().weight
    tied = embedding is model.get_output_embeddings().weight
    return bytes_of_weights(model) - (0 if tied else embedding.nbytes) + cache
