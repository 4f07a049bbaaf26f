"""The figures: a method has its one color, and a logarithmic axis no bars."""

import torch

from common.measure import plots, quantization_plots
from common.measure.evaluation import Estimate, pareto_front


def test_a_label_has_the_color_of_the_method_that_it_names_first():
    gptq, wanda = plots.METHODS["gptq"], plots.METHODS["wanda"]
    assert plots.colors(["GPTQ, all on", "gptq-w4-g64", "Wanda → GPTQ", "SparseGPT"]) == [
        *(gptq, gptq, wanda),
        plots.METHODS["sparsegpt"],
    ]
    assert plots.colors(["CE + KD", "CE + KD + MiniLM"]) == [
        plots.METHODS["ce + kd"],
        plots.METHODS["ce + kd + minilm"],
    ]
    blue, rtn, third = plots.PALETTE[0], plots.METHODS["rtn"], plots.PALETTE[2]
    assert plots.PALETTE[1] == rtn and plots.colors(["mine", "RTN", "yours"]) == [blue, rtn, third]  # RTN's is taken


def test_methods_that_are_drawn_together_differ():
    for together in (
        ("original", "rtn", "gptq", "awq", "nf4", "int8"),
        ("original", "magnitude", "wanda", "sparsegpt"),
        ("uniform", "one threshold", "sensitivity", "owl"),
        ("ce only", "kd only", "ce + kd", "ce + kd + minilm", "ce + kd + written text", "ce + shuffled kd"),
    ):
        assert len({plots.METHODS[name] for name in together}) == len(together)


def test_bars_begin_at_zero_and_become_dots_on_a_logarithmic_axis():
    near = plots.bars({"RTN": 1.0, "GPTQ": 2.0}, "error", "").axes[0]
    assert near.get_xscale() == "linear" and near.get_xlim()[0] == 0 and len(near.patches) == 2
    far = plots.bars({"RTN": 1.0, "GPTQ": 200.0}, "error", "").axes[0]
    assert far.get_xscale() == "log" and not far.patches


def test_bars_name_three_significant_digits():
    assert [plots.three_digits(v) for v in (251_840.18, 1.9, 0.0035, 999.6, 0)] == [
        *("252,000", "1.90", "0.00350", "1,000", "0.00")
    ]
    figure = plots.bars({"RTN": 0.0035, "GPTQ": 0.0191}, "KL", "")
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.00350", "0.0191"]


def test_dots_that_hardly_differ_lie_below_the_top_of_an_axis_from_zero():
    rounds = {"dense": [0.00358, 0.00359], "sparse": [0.003585, 0.00359]}
    bottom, top = plots.turns({"TTFT": rounds}, "").axes[0].get_ylim()
    assert bottom == 0 and top > 1.05 * 3.59


def test_an_outlier_does_not_make_the_rest_of_a_matrix_white():
    image = torch.ones(32, 32)
    image[3, 4] = 1000
    assert plots.matrices({"error": image}, "").axes[0].images[0].get_clim() == (-1, 1)
    assert plots.matrices({"two entries": torch.eye(2)}, "").axes[0].images[0].get_clim()[1] > 0.9


def test_a_logarithmic_axis_of_ratios_has_numbers_within_a_decade():
    axis = plots.ratios({"2:4": Estimate(7, 0.1, 6.8, 7.2), "row": Estimate(2.4, 0.1, 2.3, 2.5)}, "").axes[0]
    axis.figure.canvas.draw()
    assert {"1", "2", "5"} <= {tick.get_text() for tick in axis.get_xticklabels()}


def test_dots_show_every_series_of_every_row_and_the_limits():
    axis = plots.dots({"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}, "GB", "", {"8 GB": 8}).axes[0]
    drawn = {line.get_label(): line.get_xdata() for line in axis.lines}
    assert (list(drawn["x"]), list(drawn["y"])) == ([1, 3], [2])
    assert axis.get_xscale() == "log" and not axis.patches


def test_ratios_have_their_methods_colors():
    one = Estimate(1.1, 0.01, 1.05, 1.15)
    figure = plots.ratios({"GPTQ, all on": one, "something else": one}, "")
    assert [line.get_color() for line in figure.axes[0].lines[:1]] == [plots.METHODS["gptq"]]


def test_the_front_is_what_nobody_beats():
    points = [(4.5, 0.2, "RTN"), (4.3, 0.1, "GPTQ"), (3.3, 0.5, "GPTQ"), (4.3, 0.12, "AWQ"), (8.3, 0.01, "RTN")]
    assert pareto_front(points) == [(3.3, 0.5, "GPTQ"), (4.3, 0.1, "GPTQ"), (8.3, 0.01, "RTN")]


def test_bits_against_distortion_shows_every_point_and_the_front():
    found = {"GPTQ": [(4.3, Estimate(0.1, 0.01, 0.08, 0.12))], "RTN": [(4.3, Estimate(0.2, 0.3, -0.4, 0.8))]}
    axis = quantization_plots.bits_against_distortion(found, "").axes[0]
    assert axis.get_yscale() == "log"
    assert axis.get_legend_handles_labels()[1][-3:] == ["front", "GPTQ", "RTN"]


def test_frames_share_a_scale_and_the_heat_map_shows_the_largest_input():
    images = {"before": torch.zeros(4, 8), "end": torch.rand(4, 8)}
    panels = [axis.images[0].get_clim() for axis in quantization_plots.frames(images, "").axes if axis.images]
    assert len(panels) == 2 and panels[0] == panels[1]
    H = torch.eye(32)
    H[20, 20] = 50
    part = quantization_plots.hessian(H, 8, "").axes[0].images[0]
    assert part.get_array().max() > 1.6 and part.get_extent()[0] <= 20 < part.get_extent()[1]
