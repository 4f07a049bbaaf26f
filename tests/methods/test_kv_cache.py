"""The quantized KV cache: what it stores, against a plain cache and transformers' own quantized one."""

import pytest
import torch
import transformers
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer as TheirLayer

from common.measure.evaluation import evaluate
from common.methods.kv_cache import (
    CacheConfig,
    QuantizedCache,
    QuantizedLayer,
    ReadInPieces,
    cache_bytes,
    pack_groups,
    pack_keys,
)


@pytest.fixture
def text():
    return torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(3))


def keys(tokens=64, channels=32, seed=0):
    """Keys with two channels that are large for every token."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, 3, tokens, channels, generator=generator)
    values[..., [5, 17]] += 30
    return values


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packing_errs_at_most_half_a_step(bits):
    values = keys()
    for dim in (-1, -2):
        packed = pack_groups(values, bits, dim, 16)
        assert packed.codes.dtype == torch.uint8 and packed.codes.max() == 2**bits - 1
        error = (packed.unpack() - values).unflatten(dim, (-1, 16)).abs()
        assert (error <= packed.scale * 0.5001 + 1e-5).all()


def test_a_constant_group_is_kept():
    assert torch.equal(pack_groups(torch.full((1, 1, 4, 8), 3.0), 2, -1, 8).unpack(), torch.full((1, 1, 4, 8), 3.0))


def test_keys_by_channel_err_less_where_channels_differ():
    values = keys()
    errors = {by: (pack_keys(values, CacheConfig(2, 32, by)).unpack() - values).norm() for by in (True, False)}
    assert errors[True] < 0.3 * errors[False]


def test_the_layer_returns_what_is_stored_and_keeps_a_window():
    layer, values = QuantizedLayer(CacheConfig(bits=4, group_size=8, window=5)), keys(tokens=30, channels=32)
    returned, _ = layer.update(values[..., :21, :], -values[..., :21, :])
    assert torch.equal(returned, values[..., :21, :])  # what has just come is read as it came
    assert layer.keys.shape[-2] == 5 and layer.get_seq_length() == 21
    for token in range(21, 30):
        returned, stored = layer.update(values[..., token : token + 1, :], -values[..., token : token + 1, :])
        assert returned.shape[-2] == stored.shape[-2] == layer.get_seq_length() == token + 1
    old = torch.cat([pack_keys(values[..., a:b, :], layer.config).unpack() for a, b in ((0, 16), (16, 24))], dim=-2)
    returned, _ = layer.update(values[..., :1, :], values[..., :1, :])
    assert torch.equal(returned[..., :24, :], old)
    assert torch.equal(returned[..., 24:30, :], values[..., 24:30, :])


def generated(model, text, cache):
    options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
    attention = torch.ones_like(text)
    return model.generate(text, attention_mask=attention, past_key_values=cache, **options)[:, text.shape[1] :]


def test_generates_like_a_plain_cache_with_a_wide_window_and_nearly_with_eight_bits(llama, text):
    plain = generated(llama, text, DynamicCache(config=llama.config))
    wide = QuantizedCache(llama, CacheConfig(bits=2, group_size=16, window=200))
    assert torch.equal(generated(llama, text, wide), plain)
    fine = QuantizedCache(llama, CacheConfig(bits=8, group_size=16, window=8))
    assert (generated(llama, text, fine) == plain).float().mean() > 0.9
    assert fine.get_seq_length() == 40 + 24 - 1
    coarse = QuantizedCache(llama, CacheConfig(bits=2, group_size=16, window=0))
    assert not torch.equal(generated(llama, text, coarse), plain)


class TheirsByToken(TheirLayer):
    """transformers' quantized layer (its schedule, its residual length) with our rounding in place of quanto's."""

    def _quantize(self, tensor, axis):
        return pack_groups(tensor, self.nbits, -1, self.q_group_size)

    def _dequantize(self, stored):
        return stored.unpack()


def test_after_one_prompt_it_stores_what_transformers_stores(llama, text):
    """Without a window, and tokens as groups, both round the whole prompt at once; the next token reads the same."""
    config = CacheConfig(bits=3, group_size=8, keys_by_channel=False, window=0)
    layers = [TheirsByToken(3, -1, -1, 8, residual_length=128) for _ in range(llama.config.num_hidden_layers)]
    logits = []
    for cache in (QuantizedCache(llama, config), Cache(layers=layers)):
        with torch.no_grad():
            llama(input_ids=text, past_key_values=cache)
            logits.append(llama(input_ids=text[:, :1], past_key_values=cache).logits)
            assert cache.get_seq_length() == 41
    torch.testing.assert_close(*logits)
    with torch.no_grad():
        assert not torch.allclose(logits[0], llama(input_ids=torch.cat((text, text[:, :1]), 1)).logits[:, -1:])


def test_reading_in_pieces_is_the_model_where_nothing_is_rounded(llama, text):
    whole = evaluate(llama, text)
    wide = evaluate(ReadInPieces(llama, CacheConfig(2, 8, window=100), piece=7), text)
    torch.testing.assert_close(wide.losses, whole.losses, rtol=1e-4, atol=1e-4)
    coarse = evaluate(ReadInPieces(llama, CacheConfig(2, 8, window=0), piece=8), text)
    assert not torch.allclose(coarse.losses, whole.losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Mistral", "Gemma2"])  # a window in every block, and in every second one
def test_sliding_windows_are_those_of_the_model(family, text):
    sizes = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 8}
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes, **heads))
    whole = evaluate(model.eval(), text)
    wide = evaluate(ReadInPieces(model, CacheConfig(2, 8, window=100), piece=7), text)
    torch.testing.assert_close(wide.losses, whole.losses, rtol=1e-4, atol=1e-4)
    plain, cached = (generated(model, text, cache) for cache in (None, QuantizedCache(model, CacheConfig(window=100))))
    assert torch.equal(plain, cached)


def test_what_it_cannot_do_is_said():
    with pytest.raises(ValueError, match="do not divide 20"):
        pack_groups(torch.randn(1, 1, 4, 20), 4, -1, 8)
    with pytest.raises(ValueError, match="bits must be"):
        CacheConfig(bits=5)
    with pytest.raises(NotImplementedError, match="Beam search"):
        QuantizedLayer(CacheConfig()).reorder_cache(torch.tensor([0]))


def test_bytes():
    assert cache_bytes(1024, 32, 8, 128, 16) == 2 * 1024 * 32 * 8 * 128 * 2
    assert CacheConfig(bits=4, group_size=32).bits_per_number == 5
