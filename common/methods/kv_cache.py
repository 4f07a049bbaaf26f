"""A quantized KV cache: what is rounded together decides what is lost (KIVI, arXiv:2402.02750).

Keys have a few channels that are large for every token, so a scale for each channel over some tokens fits them, and one
for each token does not. Values have no such channels: a scale for each token fits. Scales over tokens want whole groups
of them, so the latest tokens wait in 16 bits until a group is full; they are also the ones that attention reads most.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer


@dataclass(frozen=True)
class CacheConfig:
    """How to quantize keys and values [batch, heads, tokens, channels]."""

    bits: int = 4
    group_size: int = 32  # tokens that share a key channel's scale; channels that share a token's
    keys_by_channel: bool = True  # False: a scale for each token and group of channels, as for values
    window: int = 32  # the latest tokens, in 16 bits; at least as many stay so, at most a group more

    def __post_init__(self):
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"bits must be 2, 3, 4 or 8, got {self.bits}.")
        if self.group_size < 1 or self.window < 0:
            raise ValueError(f"group_size must be at least 1 and window at least 0, got {self}.")

    @property
    def bits_per_number(self) -> float:
        """Codes, and 16 bits each for the scale and the least value of a group."""
        return self.bits + 32 / self.group_size


@dataclass(frozen=True)
class Packed:
    """Codes uint8, and for each group a scale and its least value; groups lie along `dim`."""

    codes: Tensor
    scale: Tensor
    least: Tensor
    dim: int

    def unpack(self) -> Tensor:
        """The numbers that the codes stand for, in the scale's dtype."""
        return (self.codes * self.scale + self.least).flatten(self.dim, self.dim + 1)


def pack_groups(values: Tensor, bits: int, dim: int, group_size: int) -> Packed:
    """Round to 2^bits even steps between the least and the largest value of every group along `dim`.

    Raises ValueError where group_size does not divide that dimension.
    """
    dim = dim % values.dim()
    if values.shape[dim] % group_size:
        raise ValueError(f"Groups of {group_size} do not divide {values.shape[dim]} entries along dimension {dim}.")
    grouped = values.unflatten(dim, (-1, group_size))
    least, largest = grouped.aminmax(dim=dim + 1, keepdim=True)
    scale = ((largest - least).float() / (2**bits - 1)).clamp(min=1e-8).to(values.dtype)
    codes = ((grouped - least).float() / scale.float()).round().clamp(0, 2**bits - 1).to(torch.uint8)
    return Packed(codes, scale, least, dim)


def pack_keys(keys: Tensor, config: CacheConfig) -> Packed:
    """Keys [batch, heads, tokens, channels], by channel or by token."""
    return pack_groups(keys, config.bits, -2 if config.keys_by_channel else -1, config.group_size)


class QuantizedLayer(DynamicLayer):
    """One block's cache: packed groups of old tokens, and the latest ones as they came (`keys`, `values`)."""

    def __init__(self, config: CacheConfig):
        super().__init__()
        self.config, self.packed = config, []

    def update(self, key_states: Tensor, value_states: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Append [batch, heads, new tokens, channels]; returns all keys and values, the old ones as they are stored."""
        recent = super().update(key_states, value_states)
        old = [(keys.unpack(), values.unpack()) for keys, values in self.packed]
        everything = tuple(torch.cat(parts, dim=-2) for parts in zip(*old, recent, strict=True))
        ready = max(0, recent[0].shape[-2] - self.config.window) // self.config.group_size * self.config.group_size
        if ready:
            keys, values = (tensor[..., :ready, :] for tensor in recent)
            self.packed.append(
                (pack_keys(keys, self.config), pack_groups(values, self.config.bits, -1, self.config.group_size))
            )
            self.keys, self.values = (tensor[..., ready:, :] for tensor in recent)
        return everything

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return super().get_seq_length() + sum(values.codes.shape[-3] for _, values in self.packed)

    def reset(self) -> None:
        """Forget everything."""
        self.packed, self.is_initialized = [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise NotImplementedError("Beam search is not supported by this quantized cache: use greedy search.")

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("This quantized cache cannot forget single tokens: begin again with a new one.")


class QuantizedCache(Cache):
    """A cache for `model.generate(..., past_key_values=QuantizedCache(model, config))`.

    All tokens are kept, also where attention has a sliding window: the model's own mask hides those outside of it.
    """

    def __init__(self, model, config: CacheConfig):
        blocks = model.config.get_text_config().num_hidden_layers
        super().__init__(layers=[QuantizedLayer(config) for _ in range(blocks)])


@dataclass(frozen=True)
class ReadInPieces:
    """A model that reads texts `piece` tokens at a time through a quantized cache, for `evaluation.evaluate`.

    The tokens of the piece at hand and the cache's window are read in 16 bits, all others as they are stored.
    """

    model: nn.Module
    config: CacheConfig
    piece: int
    together: int = 4  # windows in one batch

    @torch.no_grad()
    def stream(self, windows: Tensor) -> Iterator[Tensor]:
        """The logits [seqlen, vocabulary] of each of `windows` [n, seqlen]."""
        for batch in windows.to(self.model.device).split(self.together):
            cache = QuantizedCache(self.model, self.config)
            pieces = [self.model(input_ids=ids, past_key_values=cache).logits for ids in batch.split(self.piece, dim=1)]
            yield from torch.cat(pieces, dim=1)


def cache_bytes(tokens: int, blocks: int, kv_heads: int, head_dim: int, bits: float) -> float:
    """Bytes of the keys and values of so many tokens of one sequence."""
    return 2 * tokens * blocks * kv_heads * head_dim * bits / 8
