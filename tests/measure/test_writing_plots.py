"""The figures of A3."""

import torch

from common.measure import writing_plots
from common.measure.evaluation import estimate


def test_between_draws_both_ends():
    curves = {"JSD / β": {0.1: 0.9, 0.9: 0.2}, "JSD / (1 - β)": {0.1: 0.1, 0.9: 1.5}}
    axis = writing_plots.between(curves, {"forward KL": 1.0, "reverse KL": 2.0}, "").axes[0]
    assert [line.get_ydata()[0] for line in axis.lines[1::2]] == [1.0, 2.0]
    assert [text.get_text() for text in axis.texts] == ["forward KL", "reverse KL"]


def test_differences_share_their_axes():
    found = {"a": estimate(torch.tensor([0.1, 0.2])), "b": estimate(torch.tensor([-0.1, -0.3]))}
    axes = writing_plots.differences({"real": found, "own": found}, "").axes
    assert axes[0].get_xlim() == axes[1].get_xlim()
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b"]


def test_overlap_stacks_to_the_larger_of_both():
    p, q = torch.tensor([0.6, 0.4]), torch.tensor([0.2, 0.5])
    bars = writing_plots.overlap(p, q, ["x", "y"], "").axes[0].patches
    tops = [round(bar.get_y() + bar.get_height(), 3) for bar in bars]
    assert tops == [0.2, 0.4, 0.6, 0.4, 0.2, 0.5]


def test_speedups_mark_what_was_measured():
    axis = writing_plots.speedups({"γ = 1": {0.0: 0.7, 1.0: 1.3}}, {"student": (0.5, 1.1)}, "α", "").axes[0]
    assert axis.collections[0].get_offsets().tolist() == [[0.5, 1.1]]
    assert axis.lines[1].get_ydata()[0] == 1


def test_classes_name_every_model_and_limit():
    points = {"teacher": (269.0, 1e-3, 100.0), "student": (163.0, 0.9, 200.0)}
    axis = writing_plots.classes(points, [60.0, 90.0], "").axes[0]
    assert [text.get_text() for text in axis.texts] == ["teacher", "student", "60 MB", "90 MB"]
    sizes = [dots.get_sizes()[0] for dots in axis.collections]
    assert sizes[1] == 4 * sizes[0]
