"""Structured pruning: what is left is the same function with parts missing, as a smaller dense model."""

import pytest
import torch
from test_blocks import tiny

from common.methods.blocks import collect
from common.methods.compensation import output_error
from common.methods.importance import InputNorms
from common.methods.structured import (
    activation,
    block_influence,
    drop_blocks,
    narrow_ffn,
    only_blocks,
    reconstruct,
    width_as_small_as,
)


def test_block_influence_is_one_minus_cosine(llama, windows):
    with torch.no_grad():
        states = llama(windows, output_hidden_states=True).hidden_states
        last = []
        handle = llama.model.layers[-1].register_forward_hook(lambda *a: last.append(a[2]))
        llama(windows)
        handle.remove()
    final = last[0][0] if isinstance(last[0], tuple) else last[0]
    states = [*states[:-1], final]  # the last hidden state is returned normalized
    for index, influence in enumerate(block_influence(llama, windows)):
        before, after = states[index].double(), states[index + 1].double()
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        assert influence == pytest.approx((1 - cosine).mean().item(), rel=1e-4)


def test_a_block_that_does_nothing_has_no_influence_and_dropping_it_changes_nothing(llama, windows):
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight.zero_()
        llama.model.layers[1].mlp.down_proj.weight.zero_()
        influence = block_influence(llama, windows)
        assert influence[1] == pytest.approx(0, abs=1e-6)
        assert min(influence[0], influence[2]) > 0.01
        shorter = drop_blocks(llama, [1])
        torch.testing.assert_close(shorter(windows).logits, llama(windows).logits)
    assert shorter.config.num_hidden_layers == 2 and llama.config.num_hidden_layers == 3


def test_a_shorter_model_generates_with_its_cache_and_survives_saving(llama, windows, tmp_path):
    shorter = drop_blocks(llama, [0])
    text = shorter.generate(windows[:1], max_new_tokens=6, do_sample=False)
    uncached = shorter.generate(windows[:1], max_new_tokens=6, do_sample=False, use_cache=False)
    assert torch.equal(text, uncached)  # wrong layer_idx would mix up the caches
    shorter.save_pretrained(tmp_path)
    reloaded = type(llama).from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(windows).logits, shorter(windows).logits)


def test_a_narrow_ffn_equals_the_wide_one_with_those_units_silenced(llama, windows, tmp_path):
    statistics = collect(llama, windows, InputNorms)
    narrow = narrow_ffn(llama, 96, windows)
    assert {block.mlp.down_proj.in_features for block in narrow.model.layers} == {96}
    with torch.no_grad():
        for name, statistic in statistics.items():
            if name.endswith("down_proj"):
                down = llama.get_submodule(name)
                score = down.weight.norm(dim=0) * statistic.norms
                down.weight[:, score.argsort()[:32]] = 0
        torch.testing.assert_close(narrow(windows).logits, llama(windows).logits)
        narrow.save_pretrained(tmp_path)
        torch.testing.assert_close(type(llama).from_pretrained(tmp_path)(windows).logits, narrow(windows).logits)


def test_full_width_changes_nothing(llama, windows):
    same = narrow_ffn(llama, 128, windows)
    assert torch.equal(same(windows).logits, llama(windows).logits)


def test_the_model_with_only_some_blocks_is_the_shorter_one_and_then_itself_again():
    model, windows = tiny("qwen2, sliding window in some blocks"), torch.arange(24)[None]
    shorter, config = drop_blocks(model, [0]), str(model.config)
    with torch.no_grad():
        whole = model(windows).logits
        with only_blocks(model, [1, 2]) as same:
            assert torch.equal(same(windows, use_cache=False).logits, shorter(windows, use_cache=False).logits)
        assert torch.equal(model(windows).logits, whole) and str(model.config) == config


@pytest.mark.parametrize("dropped", [[3], [-1], [0, 1, 2]])
def test_impossible_blocks_are_refused(llama, dropped):
    with pytest.raises(ValueError, match="Cannot drop blocks"):
        drop_blocks(llama, dropped)


@pytest.mark.parametrize("width", [0, 129])
def test_impossible_widths_are_refused(llama, windows, width):
    with pytest.raises(ValueError, match="present 128 hidden units"):
        narrow_ffn(llama, width, windows)


def test_weights_that_are_quantized_already_are_refused_by_name(llama):
    weight = llama.model.layers[1].mlp.up_proj.weight
    llama.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"mlp\.up_proj is quantized already"):
        drop_blocks(llama, [0])


def test_blocks_that_stay_keep_their_kind_of_attention(windows):
    """Qwen2 with a sliding window in its last blocks: dropping the first leaves two that slide."""
    model = tiny("qwen2, sliding window in some blocks")
    shorter = drop_blocks(model, [0])
    assert shorter.config.layer_types == ["sliding_attention", "sliding_attention"]
    with torch.no_grad():
        hidden = model.model.embed_tokens(windows)
        handle = model.model.layers[0].register_forward_hook(lambda *_: hidden)  # a block that does nothing
        expected = model(windows).logits
        handle.remove()
        torch.testing.assert_close(shorter(windows).logits, expected)
    assert model.config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


def test_reconstruction_is_the_least_squares_of_what_is_left():
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(64, 12, generator=generator).double(), torch.randn(5, 12, generator=generator).double()
    X[:, 3] = X[:, 1] - 0.5 * X[:, 7]  # input 3 is said by others
    hessian, kept = 2 * X.T @ X / len(X), torch.tensor([0, 1, 2, 4, 5, 7, 8, 9])
    expected = torch.linalg.lstsq(X[:, kept], X @ W.T).solution.T
    found = reconstruct(W, hessian, kept, damp_percent=0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)

    def error(columns):
        wide = torch.zeros_like(W).index_copy_(1, kept, columns.double())
        return output_error(W, wide, hessian.float())

    assert error(found) < 0.9 * error(W[:, kept])


def test_a_unit_that_another_repeats_costs_nothing_once_the_rest_makes_up_for_it(make_llama, windows):
    llama = make_llama()
    with torch.no_grad():
        for block in llama.model.layers:  # the last unit repeats the first, and is weighed less
            block.mlp.gate_proj.weight[-1] = block.mlp.gate_proj.weight[0]
            block.mlp.up_proj.weight[-1] = block.mlp.up_proj.weight[0]
            block.mlp.down_proj.weight[:, -1] = 1e-3 * block.mlp.down_proj.weight[:, -1]
        plain, compensated = (narrow_ffn(llama, 127, windows, compensate=c) for c in (False, True))
        logits = llama(windows).logits
        lost = [(model(windows).logits - logits).norm() / logits.norm() for model in (plain, compensated)]
    assert lost[1] < lost[0]


def test_importances_rank_differently(llama, windows):
    with torch.no_grad():
        for block in llama.model.layers:
            block.mlp.down_proj.weight[:, :64] *= 100
        by_output = narrow_ffn(llama, 64, windows)
        by_activation = narrow_ffn(llama, 64, windows, importance=activation)
    assert all((block.mlp.down_proj.weight.abs().amax(0) > 3).all() for block in by_output.model.layers)
    assert not all((block.mlp.down_proj.weight.abs().amax(0) > 3).all() for block in by_activation.model.layers)


def test_width_and_depth_of_equal_size(make_llama, windows):
    llama = make_llama(intermediate_size=512)
    narrow = narrow_ffn(llama, width_as_small_as(llama, 1), windows)
    sizes = [sum(p.numel() for p in model.parameters()) for model in (narrow, drop_blocks(llama, [0]))]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)
