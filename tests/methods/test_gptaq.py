"""GPTAQ: equal to GPTQ at α = 0, to a plain loop in float64, to the optimum it derives; the two streams of the walk."""

import copy

import pytest
import torch
from inputs import correlated_inputs

from common.methods.blocks import iter_linears, walk
from common.methods.compensation import compensate, inverse_cholesky
from common.methods.gptaq import AsymmetricHessian, gptaq_model
from common.methods.quantization import QuantizeConfig, find_grid, gptq, gptq_model

PLAIN = QuantizeConfig(bits=3, group_size=16, desc_act=False, mse=False)


@pytest.fixture
def text():
    return torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(3))


def layer(rows=12, features=160, seed=0):
    """A weight matrix, and a statistic of inputs that earlier layers have moved a little."""
    generator = torch.Generator().manual_seed(100 + seed)
    weight = torch.randn(rows, features, generator=generator)
    original = correlated_inputs(features, 4 * features, seed)
    moved = (
        original + 0.2 * original.std() * torch.randn(original.shape, generator=generator) + 0.1 * original.roll(1, 1)
    )
    statistic = AsymmetricHessian(features, weight)
    statistic.add(moved, original)
    return weight, statistic, original, moved


def test_drift_is_the_relative_distance_of_the_inputs():
    _, statistic, original, moved = layer()
    assert statistic.drift == pytest.approx(((original - moved).norm() / moved.norm()).item(), rel=1e-4)
    expected = 2 / len(moved) * (original - moved).T @ moved
    torch.testing.assert_close(statistic.asymmetry, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def plain_gptaq(weight, statistic, config, alpha):
    """The paper's column loop, one column at a time, in float64 and without blocks."""
    w = weight.double().clone()
    hessian = statistic.matrix.double()
    hessian += config.damp_percent * hessian.diagonal().mean() * torch.eye(len(hessian))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    pull = alpha * ((statistic.asymmetry.double() @ upper.T).triu(1) @ upper)
    grid, codes = find_grid(weight, config), torch.zeros_like(weight)
    for i in range(weight.shape[1]):
        column, group = w[:, i].clone(), i // config.group_size
        scale, zero = grid.scale[:, group].double(), grid.zero[:, group].double()
        codes[:, i] = (column / scale + zero).round().clamp(0, grid.max_code)
        error = (column - (codes[:, i] - zero) * scale) / upper[i, i]
        w[:, i + 1 :] += column[:, None] * pull[i, i + 1 :] - error[:, None] * upper[i, i + 1 :]
    return codes


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_blocked_is_the_plain_loop(alpha):
    weight, statistic, *_ = layer()  # 160 columns: more than a block
    found = gptq(weight, statistic.matrix, PLAIN, asymmetry=alpha * statistic.asymmetry).codes
    expected = plain_gptaq(weight, statistic, PLAIN, alpha)
    assert (found == expected).float().mean() > 0.99  # float32 against float64: ties
    assert (gptq(weight, statistic.matrix, PLAIN).codes == expected).float().mean() < 0.95


@pytest.mark.parametrize("desc_act", [False, True])
def test_alpha_0_is_gptq(desc_act):
    weight, statistic, *_ = layer()
    config = QuantizeConfig(bits=3, group_size=16, desc_act=desc_act)
    nothing = gptq(weight, statistic.matrix, config, asymmetry=0 * statistic.asymmetry)
    assert torch.equal(nothing.codes, gptq(weight, statistic.matrix, config).codes)


def test_alpha_0_is_gptq_for_a_whole_model(llama, text):
    config = QuantizeConfig(bits=3, group_size=16)
    one, other = copy.deepcopy(llama), copy.deepcopy(llama)
    usual, ours = gptq_model(one, text, config), gptaq_model(other, text, config, alpha=0)
    assert all(torch.equal(usual[name].codes, ours[name].codes) for name in usual)


def test_act_order_permutes_the_asymmetry_with_the_columns():
    weight, statistic, *_ = layer()
    config = QuantizeConfig(bits=3, group_size=160, desc_act=True, mse=False)  # one group: columns may change places
    order = torch.argsort(statistic.matrix.diagonal(), descending=True)
    found = gptq(weight, statistic.matrix, config, asymmetry=statistic.asymmetry)
    sorted_by_hand = gptq(
        weight[:, order],
        statistic.matrix[order][:, order],
        QuantizeConfig(bits=3, group_size=160, desc_act=False, mse=False),
        asymmetry=statistic.asymmetry[order][:, order],
    )
    assert (found.codes[:, order] == sorted_by_hand.codes).float().mean() > 0.99


def test_it_comes_nearer_to_the_original_output_than_gptq():
    weight, statistic, original, moved = layer(rows=64)
    wanted = weight @ original.T

    def error(alpha):
        found = gptq(weight, statistic.matrix, PLAIN, asymmetry=alpha * statistic.asymmetry).dequantize()
        return ((found @ moved.T - wanted).norm() / wanted.norm()).item()

    assert error(1.0) < error(0.25) < error(0.0)


def test_block_size_does_not_change_the_result():
    weight, statistic, *_ = layer()
    factor = inverse_cholesky(statistic.matrix, 0.01)
    drift = (statistic.asymmetry @ factor.T).triu(1) @ factor
    results = [
        compensate(weight.T.contiguous(), factor, lambda column: column.round(), drift=drift, block_columns=size)
        for size in (1, 7, 32, 160)
    ]
    assert all((one == results[0]).float().mean() > 0.99 for one in results)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_both_streams_are_those_of_the_two_networks(llama, text, batch_size):
    """Zeroing every layer: the original's inputs must still be those of the untouched network."""
    seen, changed = {}, copy.deepcopy(llama)

    class Both:
        def __init__(self):
            self.here, self.there = [], []

        def add(self, inputs, original):
            self.here.append(inputs.clone())
            self.there.append(original.clone())

    def change(stage, statistic):
        for name, linear in stage.named.items():
            seen[name] = torch.cat(statistic.here), torch.cat(statistic.there)
            linear.weight.mul_(0.5)

    walk(changed, text, lambda *_: Both(), change, beside=True, batch_size=batch_size)
    expected = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: expected.update({name: args[0].flatten(0, 1)}))
        for name, linear in iter_linears(llama)
    ]
    with torch.no_grad():
        llama(input_ids=text)
    for handle in handles:
        handle.remove()
    for name, (here, there) in seen.items():
        torch.testing.assert_close(there, expected[name], rtol=1e-4, atol=1e-5)
        if "layers.0.self_attn.q" not in name and "layers.0.self_attn.k" not in name:
            assert name.endswith("layers.0.self_attn.v_proj") or not torch.allclose(here, there)


def test_experts_are_refused_by_name(text):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(
        MixtralConfig(vocab_size=256, num_key_value_heads=2, num_local_experts=2, **sizes)
    ).eval()
    with pytest.raises(ValueError, match=r"has experts.*token by token"):
        gptaq_model(model, text, QuantizeConfig(group_size=16))
