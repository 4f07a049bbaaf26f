"""The figures of the notebook on number formats."""

import pytest
import torch

from common.measure import format_plots
from common.measure.evaluation import Estimate


def test_grids_are_drawn_with_their_largest_value_at_one():
    axis = format_plots.grids({"INT4": torch.arange(-7.0, 8), "E2M1": torch.tensor([-6.0, 0, 6])}, "").axes[0]
    assert [text.get_text() for text in axis.get_yticklabels()] == ["INT4: 15 values", "E2M1: 3 values"]
    strokes = [[segment[0][0] for segment in lines.get_segments()] for lines in axis.collections]
    assert strokes[1] == [-1, 0, 1] and max(strokes[0]) == 1 and len(strokes[0]) == 15


def test_estimates_show_each_value_with_its_interval():
    found = {"NVFP4": {"RTN": Estimate(0.2, 0.01, 0.18, 0.22), "GPTQ": Estimate(0.1, 0.06, -0.02, 0.22)}}
    found["MXFP4"] = {"RTN": Estimate(0.4, 0.01, 0.38, 0.42)}
    axis = format_plots.estimates(found, "KL", "").axes[0]
    assert axis.get_xscale() == "log" and axis.get_xlabel() == "KL (logarithmic)"
    assert [list(line.get_xdata()) for line in (bars.lines[0] for bars in axis.containers)] == [[0.2, 0.4], [0.1]]
    low, high = axis.containers[1].lines[2][0].get_segments()[0][:, 0]  # below zero: as far as the axis can show
    assert (low, high) == pytest.approx((0.01, 0.22))
