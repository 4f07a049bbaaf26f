"""Pruning: every mask against an independent NumPy statement of its paper's rule, SparseGPT against brute force."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inputs import correlated_inputs
from torch import nn

from common.methods.blocks import collect, iter_linears
from common.methods.compensation import BLOCK_COLUMNS, Hessian, inverse_cholesky, output_error
from common.methods.importance import InputNorms, keep_highest
from common.methods.pruning import (
    METHODS,
    PruneConfig,
    model_sparsity,
    prune,
    prune_model,
    prune_once,
    prune_together,
    sparsegpt,
)

PATTERNS = ("unstructured", "2:4", "4:8")


def layer(rows: int, features: int, seed: int = 0):
    """A random weight matrix, and the Hessian and the norms of correlated inputs."""
    weight = torch.randn(rows, features, generator=torch.Generator().manual_seed(100 + seed))
    inputs = correlated_inputs(features, 4 * features, seed)
    hessian, norms = Hessian(features, weight), InputNorms(features, weight)
    hessian.add(inputs)
    norms.add(inputs)
    return weight, hessian, norms, inputs


# --- masks against the papers' rules --------------------------------------------------------------------------------


def remove_lowest(scores: np.ndarray, count: int) -> np.ndarray:
    """A mask over a list of scores, one weight at a time: the lowest goes, of equals the first."""
    keep, left = np.ones(len(scores), dtype=bool), list(range(len(scores)))
    for _ in range(count):
        lowest = min(left, key=lambda i: (scores[i], i))
        keep[lowest] = False
        left.remove(lowest)
    return keep


def wanda_rule(weight: np.ndarray, norms: np.ndarray, sparsity: float, group: int) -> np.ndarray:
    """Wanda, sections 3 and 3.1: scores |W_ij|·‖x_j‖₂ compared within a row, or within groups of M of a row."""
    keep = np.ones(weight.shape, dtype=bool)
    for i, row in enumerate(weight):
        scores = np.float32(np.abs(row)) * np.float32(norms)
        for start in range(0, len(row), group or len(row)):
            part = slice(start, start + (group or len(row)))
            keep[i, part] = remove_lowest(scores[part], round(sparsity * len(scores[part])))
    return keep


def magnitude_rule(weight: np.ndarray, sparsity: float, group: int) -> np.ndarray:
    """The baseline of Wanda's repository: |W| compared within the whole matrix, or within groups of M of a row."""
    if group:
        return wanda_rule(weight, np.ones(weight.shape[1]), sparsity, group)
    return remove_lowest(np.abs(weight).flatten(), round(sparsity * weight.size)).reshape(weight.shape)


few_values = arrays(  # small integers: many ties
    np.float32, st.tuples(st.integers(1, 6), st.sampled_from([8, 16, 24])), elements=st.integers(-3, 3).map(float)
)


@given(weight=few_values, sparsity=st.floats(0, 0.95), data=st.data())
def test_masks_follow_the_papers_rules_ties_included(weight, sparsity, data):
    norms = data.draw(arrays(np.float32, weight.shape[1], elements=st.integers(0, 4).map(float)))
    pattern = data.draw(st.sampled_from(PATTERNS))
    group = 0 if pattern == "unstructured" else int(pattern[-1])
    sparsity = 0.5 if group else sparsity
    statistic = InputNorms(weight.shape[1], torch.empty(0))
    statistic.squares += torch.from_numpy(norms).square()
    for method, rule in {
        "wanda": wanda_rule(weight, norms, sparsity, group),
        "magnitude": magnitude_rule(weight, sparsity, group),
    }.items():
        pruned, keep = prune(torch.from_numpy(weight), statistic, PruneConfig(method, sparsity, pattern))
        assert np.array_equal(keep.numpy(), rule), method
        assert np.array_equal(pruned.numpy(), weight * rule), method


def brute_force_sparsegpt(weight, hessian, config: PruneConfig) -> tuple[np.ndarray, np.ndarray]:
    """SparseGPT in float64, a linear system solved anew for every column; masks chosen at the head of each span.

    Of the columns F not yet reached, [H_FF⁻¹]_cc is what removing weight w_c costs: w_c² / [H_FF⁻¹]_cc ... and the
    paper's score for a later column c of the span is taken with the columns before c eliminated.
    """
    w, h = weight.double().numpy().copy(), hessian.double().numpy()
    h = h + config.damp_percent * np.diag(h).mean() * np.eye(len(h))
    columns, span = len(h), config.group or BLOCK_COLUMNS
    keep = np.ones(w.shape, dtype=bool)
    for c in range(columns):
        if c % span == 0:
            cost = [np.linalg.inv(h[j:, j:])[0, 0] for j in range(c, min(c + span, columns))]
            scores = w[:, c : c + span] ** 2 / np.array(cost)
            part = (slice(None), slice(c, c + span))
            if config.group:
                keep[part] = [remove_lowest(row, round(config.sparsity * span)) for row in scores]
            else:
                flat = remove_lowest(scores.flatten(), round(config.sparsity * scores.size))
                keep[part] = flat.reshape(scores.shape)
        change = np.where(keep[:, c], 0, -w[:, c])
        free = np.arange(c + 1, columns)
        w[:, c] += change
        if len(free):
            w[:, free] -= np.outer(change, np.linalg.solve(h[np.ix_(free, free)], h[free, c]))
    return w, keep


@pytest.mark.parametrize("features", [32, 160], ids=lambda n: f"{n}columns")  # one crosses a block of 128
@pytest.mark.parametrize("pattern", PATTERNS)
def test_sparsegpt_is_optimal_brain_surgery(features, pattern):
    config = PruneConfig("sparsegpt", pattern=pattern)
    weight, hessian, _, _ = layer(rows=6, features=features)
    pruned, keep = prune(weight, hessian, config)
    expected, expected_keep = brute_force_sparsegpt(weight, hessian.matrix, config)
    assert (keep.numpy() == expected_keep).mean() > 0.99  # float32 may tip two nearly equal scores
    assert output_error(torch.from_numpy(expected), pruned, hessian.matrix) < 1e-2
    magnitude = prune(weight, None, PruneConfig("magnitude", pattern=pattern))[1]
    assert (magnitude.numpy() == expected_keep).mean() < 0.95  # ... which says something only if masks differ


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.0, 0.2, 0.5, 0.7])
def test_sparsity_is_exact_where_the_method_compares(method, sparsity):
    weight, hessian, _, _ = layer(rows=10, features=256)
    _, keep = prune(weight, hessian, PruneConfig(method, sparsity))
    compared = {
        "wanda": keep,  # each row
        "magnitude": keep.reshape(1, -1),  # the matrix
        "sparsegpt": keep.view(10, 2, 128).transpose(0, 1).reshape(2, -1),  # each block of 128 columns
    }[method]
    removed = (~compared).sum(1)
    assert (removed == round(sparsity * compared.shape[1])).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4)])
def test_every_group_keeps_n_of_m(method, n, m):
    weight, hessian, _, _ = layer(rows=10, features=192)
    pruned, keep = prune(weight, hessian, PruneConfig(method, 1 - n / m, f"{n}:{m}"))
    assert (keep.view(10, -1, m).sum(-1) == n).all()
    assert torch.equal(pruned != 0, keep)


# --- what SparseGPT promises ----------------------------------------------------------------------------------------


def test_sparsegpt_that_removes_nothing_changes_nothing():
    weight, hessian, _, _ = layer(rows=8, features=160)
    pruned, keep = prune(weight, hessian, PruneConfig("sparsegpt", 0.0))
    assert keep.all()
    assert torch.equal(pruned, weight)


@given(seed=st.integers(0, 30), sparsity=st.sampled_from([0.3, 0.5, 0.7]))
def test_with_wandas_mask_compensation_lowers_the_output_error(seed, sparsity):
    weight, hessian, _, _ = layer(rows=8, features=48, seed=seed)
    removed, keep = prune(weight, hessian, PruneConfig("wanda", sparsity))
    compensated, same = sparsegpt(weight, hessian.matrix, choose=lambda _, columns: keep[:, columns])
    assert torch.equal(same, keep)
    assert not compensated[~keep].any()
    assert output_error(weight, compensated, hessian.matrix) < output_error(weight, removed, hessian.matrix)


def test_wanda_is_sparsegpt_with_a_diagonal_hessian():
    """With uncorrelated inputs [H⁻¹]_jj = 1/H_jj and nothing is compensated: the score is Wanda's, squared."""
    weight, hessian, norms, _ = layer(rows=8, features=128)
    diagonal = torch.diag(hessian.matrix.diagonal())
    factor = inverse_cholesky(diagonal, damp_percent=1e-9)
    surgeon = (weight / factor.diagonal()).square()
    wanda = (weight.abs() * norms.norms).square()
    torch.testing.assert_close(surgeon / surgeon.sum(), wanda / wanda.sum(), rtol=1e-4, atol=0)
    pruned, keep = sparsegpt(weight, diagonal, lambda scores, _: keep_highest(scores, 0.5))
    torch.testing.assert_close(pruned, weight * keep)


def test_input_norms_are_those_of_the_inputs_and_of_the_hessian():
    _, hessian, norms, inputs = layer(rows=1, features=32)
    torch.testing.assert_close(norms.norms, inputs.norm(dim=0))
    torch.testing.assert_close(hessian.norms, inputs.norm(dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_layers_pruned_together_are_pruned_as_if_alone(method):
    weight, hessian, _, _ = layer(rows=12, features=160)
    parts, sparsities = list(weight.split([6, 4, 2])), [0.2, 0.5, 0.7]
    together = prune_together(parts, hessian, PruneConfig(method), sparsities)
    for part, sparsity, (pruned, keep) in zip(parts, sparsities, together, strict=True):
        alone, mask = prune(part, hessian, PruneConfig(method, sparsity))
        assert torch.equal(keep, mask)
        torch.testing.assert_close(pruned, alone)


def test_keep_highest_counts_by_rounding():
    assert keep_highest(torch.arange(10.0), 0.29).sum() == 7  # 2.9 weights: three go (floor would take 2)


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_prune_model_prunes_every_linear_layer_and_nothing_else(llama, make_llama, windows, method, pattern):
    before = make_llama()
    masks = prune_model(llama, windows, PruneConfig(method, pattern=pattern))
    assert set(masks) == {name for name, _ in iter_linears(llama)}
    for name, linear in iter_linears(llama):
        assert torch.equal(linear.weight != 0, masks[name])
    assert model_sparsity(llama) == pytest.approx(0.5, abs=0.002)
    kept = {n: p for n, p in llama.named_parameters() if n.removesuffix(".weight") not in masks}
    for name, parameter in kept.items():
        assert torch.equal(parameter, before.get_parameter(name)), name


def test_later_layers_see_what_earlier_ones_became(llama, make_llama, windows):
    """Sequential pruning measures the norms behind pruned blocks; `prune_once` does not."""
    config = PruneConfig("wanda", 0.6)
    sequential = prune_model(llama, windows, config)
    dense = make_llama()
    once = prune_once(dense, collect(dense, windows, InputNorms), config)
    first, *_, last = once
    assert torch.equal(sequential[first], once[first])
    assert not torch.equal(sequential[last], once[last])


@pytest.mark.parametrize(("method", "sees_its_own_block_pruned"), [("wanda", False), ("sparsegpt", True)])
def test_what_a_block_shows_while_it_is_pruned(llama, make_llama, windows, method, sees_its_own_block_pruned):
    """Wanda's norms are those of the block as it was (its authors' code); SparseGPT goes on layer by layer."""
    config = PruneConfig(method, 0.6)
    masks = prune_model(llama, windows, config)
    dense = make_llama()
    once = prune_once(dense, collect(dense, windows, Hessian), config)
    down = "model.layers.0.mlp.down_proj"
    assert torch.equal(masks[down], once[down]) is not sees_its_own_block_pruned


@pytest.mark.parametrize("method", METHODS)
def test_prune_once_on_one_block_equals_prune_model(make_llama, windows, method):
    """With one layer pruned and the rest left alone, there is nothing that a later layer could see."""
    model, other = make_llama(), make_llama()
    target = "model.layers.0.self_attn.q_proj"
    allocation = {name: 0.5 if name == target else 0.0 for name, _ in iter_linears(model)}
    config = PruneConfig(method)
    masks = prune_model(model, windows, config, allocation)
    statistics = collect(other, windows, Hessian)
    once = prune_once(other, statistics, config, allocation)
    assert torch.equal(masks[target], once[target])
    for found in (masks, once):  # also those that read the same input
        assert [name for name, keep in found.items() if not keep.all()] == [target]


def test_shuffled_norms_lose(make_llama, windows):
    """Sabotage: Wanda with another channel's norms changes the model's outputs more than Wanda with the right ones."""
    original = make_llama(num_hidden_layers=4)
    with torch.no_grad():
        for name, linear in iter_linears(original):  # channels of very different size, as in a trained model
            if name.endswith("q_proj"):
                generator = torch.Generator().manual_seed(len(name))
                norm = original.model.layers[int(name.split(".")[2])].input_layernorm
                norm.weight.copy_(torch.exp(torch.randn(linear.in_features, generator=generator)))
        expected = original(windows).logits
        errors = {}
        for sabotage in (False, True):
            model = make_llama(num_hidden_layers=4)
            model.load_state_dict(original.state_dict())
            statistics = collect(model, windows, InputNorms)
            if sabotage:
                for statistic in set(statistics.values()):
                    statistic.squares = statistic.squares[torch.randperm(len(statistic.squares))]
            prune_once(model, statistics, PruneConfig("wanda", 0.3))
            errors[sabotage] = (model(windows).logits - expected).norm()
    assert errors[False] < errors[True]


# --- what cannot be pruned ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5])
def test_sparsity_outside_zero_to_one_is_refused(sparsity):
    with pytest.raises(ValueError, match="0 ≤ sparsity < 1"):
        PruneConfig(sparsity=sparsity)


@pytest.mark.parametrize("pattern", ["4:4", "5:4", "0:4", "2/4", "two:four", "2:3"])
def test_impossible_patterns_are_refused(pattern):
    with pytest.raises(ValueError, match=r"pattern|power of two"):
        PruneConfig(pattern=pattern)


def test_pattern_and_sparsity_must_agree():
    with pytest.raises(ValueError, match=r"means a sparsity of 0\.5, not 0\.7"):
        PruneConfig(sparsity=0.7, pattern="2:4")


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match="choose magnitude, wanda, sparsegpt"):
        PruneConfig("wand")


def test_width_that_m_does_not_divide_is_refused_before_anything_changes(make_llama, windows):
    model = make_llama(intermediate_size=130)
    with pytest.raises(ValueError, match=r"groups of 4.*mlp\.down_proj has 130 inputs"):
        prune_model(model, windows, PruneConfig(pattern="2:4"))
    assert model_sparsity(model) == 0


def test_model_without_linear_layers_is_refused(llama, windows):
    for block in llama.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                block.set_submodule(name, nn.Identity())
    with pytest.raises(ValueError, match=r"no torch\.nn\.Linear layer"):
        prune_model(llama, windows, PruneConfig())


def test_pruned_model_is_pruned_further_with_a_warning(llama, windows):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_model(llama, windows, PruneConfig("wanda", 0.5))
    with pytest.warns(UserWarning, match=r"pruned already: 50\.\d% of its linear weights are zero"):
        prune_model(llama, windows, PruneConfig("wanda", 0.7))
    assert model_sparsity(llama) == pytest.approx(0.7, abs=0.01)


def test_allocation_must_name_every_layer(llama, windows):
    with pytest.raises(ValueError, match="every linear layer"):
        prune_model(llama, windows, PruneConfig(), {"model.layers.0.self_attn.q_proj": 0.5})


def test_input_norms_in_pieces_and_in_16_bits():
    """Every batch counts, also beyond the 4,096 tokens of a chunk, and squares are summed in float32."""
    inputs = torch.randn(5000, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    norms = InputNorms(16, inputs)
    for piece in inputs.split([300, 4700]):
        norms.add(piece)
    assert norms.norms.dtype == torch.float32
    torch.testing.assert_close(norms.norms, inputs.double().norm(dim=0).float(), rtol=1e-5, atol=0)


def test_impossible_allocations_are_refused_before_anything_changes(llama, windows):
    uniform = {name: 0.5 for name, _ in iter_linears(llama)}
    last = next(reversed(uniform))
    with pytest.raises(ValueError, match=r"0 ≤ sparsity < 1; got 1\.2"):
        prune_model(llama, windows, PruneConfig(), uniform | {last: 1.2})
    with pytest.raises(ValueError, match="Pattern 2:4 fixes every layer's sparsity"):
        prune_model(llama, windows, PruneConfig(pattern="2:4"), uniform)
    assert model_sparsity(llama) == 0


@pytest.mark.parametrize(("zeros", "warns"), [(0.005, False), (0.02, True)])
def test_a_model_with_a_percent_of_zeros_is_a_pruned_one(llama, windows, zeros, warns):
    with torch.no_grad():
        for _, linear in iter_linears(llama):
            linear.weight.view(-1)[: round(zeros * linear.weight.numel())] = 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prune_model(llama, None, PruneConfig("magnitude"))
    assert bool([w for w in caught if "pruned already" in str(w.message)]) is warns
