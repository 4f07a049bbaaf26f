"""AWQ: scaling is an identity before rounding, and helps after it where activations are uneven."""

import torch

from common.awq import awq_model, channel_scale, round_scaled, search_scale
from common.compensation import Hessian, output_error
from common.quantization import QuantizeConfig, rtn

CONFIG = QuantizeConfig(bits=3, group_size=32, mse=False)


def uneven_inputs(features=64, tokens=512):
    inputs = torch.randn(tokens, features)
    inputs[:, ::16] *= 30  # a few outlier channels, as in real activations
    return inputs


def statistic_of(inputs):
    statistic = Hessian(inputs.shape[1], inputs)
    statistic.add(inputs)
    return statistic


def test_alpha_zero_is_plain_rounding():
    weight = torch.randn(16, 64)
    scale = channel_scale(uneven_inputs().abs().mean(0), alpha=0.0)
    torch.testing.assert_close(round_scaled(weight, scale, CONFIG), rtn(weight, CONFIG).dequantize())


def test_search_beats_plain_rounding_when_channels_are_uneven():
    torch.manual_seed(0)
    weight, statistic = torch.randn(32, 64), statistic_of(uneven_inputs())
    scale, alpha = search_scale(weight, statistic, CONFIG)
    plain = output_error(weight, rtn(weight, CONFIG).dequantize(), statistic.matrix)
    assert alpha > 0
    assert output_error(weight, round_scaled(weight, scale, CONFIG), statistic.matrix) < 0.7 * plain


def test_even_channels_gain_nothing():
    torch.manual_seed(0)
    scale = channel_scale(torch.ones(64), alpha=0.5)
    assert torch.equal(scale, torch.ones(64))


def test_whole_model_leaves_o_proj_unscaled_with_grouped_queries(llama):
    windows = torch.randint(0, llama.config.vocab_size, (4, 32))
    alphas = awq_model(llama, windows, CONFIG)
    assert len(alphas) == 4 * llama.config.num_hidden_layers
    assert all(alpha == 0 for stage, alpha in alphas.items() if stage.endswith("o_proj"))
