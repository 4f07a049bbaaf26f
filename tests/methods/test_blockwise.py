"""Block-wise training: it comes nearer to the original block, stays on the grid, and begins where GPTAQ ends."""

import copy

import pytest
import torch

from common.methods.blocks import iter_linears
from common.methods.blockwise import blockwise_model
from common.methods.gptaq import gptaq_model
from common.methods.qad import on_grid
from common.methods.quantization import QuantizeConfig

CONFIG = QuantizeConfig(bits=2, group_size=16)


@pytest.fixture
def text():
    return torch.randint(256, (8, 24), generator=torch.Generator().manual_seed(3))


def distance(model, original, text):
    with torch.no_grad():
        ours, theirs = (m.model(input_ids=text).last_hidden_state for m in (model, original))
    return ((ours - theirs).norm() / theirs.norm()).item()


def trained(llama, text, steps, learning_rate=1e-2, **options):
    model = copy.deepcopy(llama)
    options = {"batch_size": 4} | options
    return model, blockwise_model(model, text, CONFIG, steps=steps, learning_rate=learning_rate, **options)


def test_training_comes_nearer_to_the_original(llama, text):
    start, _ = trained(llama, text, steps=0)
    model, quantized = trained(llama, text, steps=60)
    assert distance(model, llama, text) < 0.85 * distance(start, llama, text)
    assert on_grid(model, quantized)
    assert set(quantized) == {name for name, _ in iter_linears(llama)}
    assert not any(p.requires_grad for _, linear in iter_linears(model) for p in linear.parameters())


def test_without_steps_it_is_gptaq(llama, text):
    other = copy.deepcopy(llama)
    expected = gptaq_model(other, text, CONFIG, batch_size=4)
    _, quantized = trained(llama, text, steps=0)
    for name, weight in expected.items():
        assert torch.equal(quantized[name].codes, weight.codes)
        assert torch.equal(quantized[name].scale, weight.scale)


def test_embeddings_and_norms_stay(llama, text):
    model, _ = trained(llama, text, steps=3)
    changed = {name for name, _ in iter_linears(llama)}
    for name, value in llama.state_dict().items():
        if name.removesuffix(".weight") not in changed:
            assert torch.equal(model.state_dict()[name], value)


def test_bfloat16_models_stay_bfloat16(llama, text):
    model, quantized = trained(llama.bfloat16(), text, steps=2)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert on_grid(model, quantized)
