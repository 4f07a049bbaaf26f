"""Quantization-aware distillation: where it starts, its gradients, and that what it ends with is on the grid."""

import copy

import pytest
import torch
from families import build

from common.methods.blocks import iter_linears
from common.methods.distillation import kd_loss
from common.methods.qad import GAIN_SPEED, FakeQuantize, finish_qad, on_grid, prepare_qad
from common.methods.quantization import QuantizeConfig, QuantizedWeight, gptq_model, rtn, rtn_model
from common.methods.training import DistillationTrainer, Objective, WindowDataset, training_arguments

CONFIG = QuantizeConfig(bits=3, group_size=16)


@pytest.fixture
def text():
    return torch.randint(256, (12, 16), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def quantized(llama, text):
    """A quantized copy of the tiny model, its quantized weights, and the original."""
    model = copy.deepcopy(llama)
    return model, gptq_model(model, text, CONFIG), llama


def logits(model, text):
    with torch.no_grad():
        return model(input_ids=text).logits


def test_begins_with_what_the_codes_stand_for_and_ends_on_the_grid(quantized, text):
    model, weights, _ = quantized
    before = logits(model, text)
    prepare_qad(model, weights)
    torch.testing.assert_close(logits(model, text), before, rtol=1e-5, atol=1e-5)

    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(weights)  # a shadow matrix and its scales, nothing else
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    moved = logits(model, text)
    finished = finish_qad(model)
    assert on_grid(model, finished)
    assert set(finished) == set(weights)
    # scales are float16 in the file: half a unit in the last place of 11 bits, per factor
    torch.testing.assert_close(logits(model, text), moved, rtol=0, atol=2e-2 * moved.abs().max().item())
    changed = [name for name in weights if not torch.equal(finished[name].codes, weights[name].codes)]
    assert changed
    assert all(torch.equal(finished[name].zero, weights[name].zero) for name in weights)
    assert not any(p.requires_grad for p in model.parameters())


def test_untrained_codes_come_back_unchanged(quantized):
    model, weights, _ = quantized
    finished = finish_qad(prepare_qad(model, weights))
    for name, weight in weights.items():
        assert torch.equal(finished[name].codes, weight.codes), name
        assert torch.equal(finished[name].scale, weight.scale), name


def test_gradients_are_straight_through_inside_and_lsq_for_the_scales():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    fake = FakeQuantize(rtn(weight, CONFIG))
    shadow = (3 * weight).requires_grad_()  # three times the range: some of it is cut
    upstream = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    fake(shadow).backward(upstream)

    scale, zero = (t.repeat_interleave(16, dim=1) for t in (fake.scale, fake.zero))
    ratio = shadow.detach() / scale
    unclamped = ratio.round() + zero
    inside = (unclamped >= 0) & (unclamped <= 7)
    assert 0.1 < inside.float().mean() < 0.9
    torch.testing.assert_close(shadow.grad, upstream * inside)
    # GAIN_SPEED · d Ŵ / d log scale = scale · (round(r) - r) inside, scale · (bound - zero) outside
    slope = scale * torch.where(inside, ratio.round() - ratio, unclamped.clamp(0, 7) - zero)
    expected = GAIN_SPEED * (upstream * slope).view(4, 2, 16).sum(-1)
    torch.testing.assert_close(fake.log_gain.grad, expected)


def test_training_brings_the_quantized_model_closer_to_the_original(tmp_path, quantized, text):
    model, weights, original = quantized

    def distance():
        return kd_loss(logits(model, text).flatten(0, 1), logits(original, text).flatten(0, 1), 1.0).item()

    before = distance()
    arguments = training_arguments(
        tmp_path, name="qad", steps=40, batch_size=6, learning_rate=2e-3, seed=0, evaluations=0, on_cpu=True,
        weight_decay=0.0,
    )  # fmt: skip
    prepare_qad(model, weights)
    embeddings = model.get_input_embeddings().weight.clone()
    objective = Objective(alpha=0.0)
    DistillationTrainer(model, arguments, WindowDataset(text), objective, teacher=original).train()
    assert on_grid(model, finish_qad(model))
    assert distance() < 0.6 * before
    assert torch.equal(model.get_input_embeddings().weight, embeddings)


def test_finished_weights_are_saved_and_read_like_any_gptq_file(tmp_path, make_llama, tokenizer):
    from common.formats.gptq import save_gptq

    model = make_llama(hidden_size=128, intermediate_size=256)
    config = QuantizeConfig(bits=4, group_size=32)
    weights = {name: rtn(linear.weight, config) for name, linear in iter_linears(model)}
    finished = finish_qad(prepare_qad(model, weights))
    assert all(isinstance(weight, QuantizedWeight) for weight in finished.values())
    assert save_gptq(tmp_path / "qad", model, tokenizer, finished, method="qad", parent="tiny").weight_bytes > 0


def test_refuses_what_is_not_the_models(llama):
    weight = rtn(torch.randn(4, 32), CONFIG)
    with pytest.raises(ValueError, match="not a linear layer"):
        prepare_qad(llama, {"model.layers.0.self_attn.q_proj": weight})


def test_fused_experts_are_refused_before_anything_changes():
    model = build("mixtral")
    with pytest.raises(ValueError, match=r"training on the grid.*experts\.0\.gate_up_proj is no nn.Linear"):
        prepare_qad(model, rtn_model(copy.deepcopy(model), QuantizeConfig(bits=4, group_size=8)))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_rotary_frequencies_keep_their_precision(quantized):
    """They are a buffer in float32, also in models of 16 bits; rounded, the model would lose its positions."""
    model, weights, _ = quantized
    frequencies = model.model.rotary_emb.inv_freq.clone()
    finish_qad(prepare_qad(model, weights), torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
