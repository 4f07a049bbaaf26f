"""How sparsity is shared out among layers: the total stays, OWL's formula, one global threshold."""

import numpy as np
import pytest
import torch

from common.methods.allocation import block_of, by_importance, one_threshold, outlier_ratios, owl, total_sparsity
from common.methods.blocks import collect, iter_linears
from common.methods.importance import InputNorms, wanda_scores
from common.methods.pruning import PruneConfig, model_sparsity, prune_model


def owl_reference(ratios: list[float], sparsity: float, span: float) -> np.ndarray:
    """Per-block sparsity, line by line as in OWL's repository (its λ is `span`)."""
    ratio = np.array(ratios, dtype=np.float64)
    ratio = (ratio - ratio.min()) * (1 / (ratio.max() - ratio.min()) * span * 2)
    ratio = ratio - np.mean(ratio) + (1 - sparsity)
    return 1 - ratio


def test_by_importance_is_owls_formula(llama):
    generator = np.random.default_rng(0)
    for _ in range(50):
        importance, sparsity = generator.uniform(0, 10, 3).tolist(), generator.uniform(0.2, 0.8)
        span = generator.uniform(0, 0.5) * min(sparsity, 1 - sparsity)
        allocation = by_importance(llama, importance, sparsity, span)
        expected = owl_reference(importance, sparsity, span)
        for name, value in allocation.items():
            assert value == pytest.approx(expected[block_of(name)], abs=1e-9)
        assert total_sparsity(llama, allocation) == pytest.approx(sparsity, abs=1e-9)


def test_equal_importance_is_uniform(llama):
    for sparsity in by_importance(llama, [2.0, 2.0, 2.0], 0.6, 0.1).values():
        assert sparsity == pytest.approx(0.6)


def test_outlier_ratios_count_large_scores_block_by_block(llama, windows):
    statistics = collect(llama, windows, InputNorms)
    ratios = outlier_ratios(llama, statistics, multiple=3.0)
    for index, ratio in enumerate(ratios):
        scores = [
            wanda_scores(linear.weight, statistics[name].norms).detach().numpy().ravel()
            for name, linear in iter_linears(llama)
            if f".layers.{index}." in name
        ]
        flat = np.concatenate(scores)
        assert ratio == pytest.approx((flat > 3.0 * flat.mean()).mean())
    assert max(ratios) > 0


def test_owl_keeps_more_where_outliers_are(llama, windows):
    statistics = collect(llama, windows, InputNorms)
    ratios = outlier_ratios(llama, statistics)
    per_block = {block_of(name): sparsity for name, sparsity in owl(llama, statistics, 0.7, 0.08).items()}
    assert sorted(per_block, key=per_block.get) == sorted(range(len(ratios)), key=lambda b: -ratios[b])


@pytest.mark.parametrize("with_norms", [False, True])
def test_one_threshold_removes_what_lies_below_it_everywhere(llama, windows, with_norms):
    statistics = collect(llama, windows, InputNorms) if with_norms else None
    allocation = one_threshold(llama, 0.5, statistics)
    assert total_sparsity(llama, allocation) == pytest.approx(0.5, abs=1e-3)
    scores = {
        name: (wanda_scores(linear.weight, statistics[name].norms) if with_norms else linear.weight.abs()).detach()
        for name, linear in iter_linears(llama)
    }
    threshold = np.sort(torch.cat([s.flatten() for s in scores.values()]).numpy())[
        round(0.5 * sum(s.numel() for s in scores.values())) - 1
    ]
    for name, score in scores.items():
        assert allocation[name] == pytest.approx((score <= threshold).float().mean().item(), abs=1e-6)


def test_an_allocation_prunes_each_layer_to_its_share(llama, windows):
    allocation = owl(llama, collect(llama, windows, InputNorms), 0.6, 0.1)
    masks = prune_model(llama, windows, PruneConfig("wanda", 0.6), allocation)
    for name, keep in masks.items():
        per_row = (~keep).sum(1)
        assert (per_row == round(allocation[name] * keep.shape[1])).all()
    assert model_sparsity(llama) == pytest.approx(0.6, abs=0.01)


def test_impossible_spans_and_counts_are_refused(llama):
    with pytest.raises(ValueError, match=r"span must lie between 0 and 0\.3"):
        by_importance(llama, [1.0, 2.0, 3.0], 0.7, 0.31)
    with pytest.raises(ValueError, match="2 importances for 3 blocks"):
        by_importance(llama, [1.0, 2.0], 0.5, 0.1)
    with pytest.raises(ValueError, match="0 ≤ sparsity < 1"):
        one_threshold(llama, 1.0)
