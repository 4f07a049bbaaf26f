"""The figures of the advanced notebooks."""

from common.measure import advanced_plots

POINTS = {
    "16 bits": (16.0, 0.001, 1.0),
    "good": (4.0, 0.1, 30.0),
    "worse and larger": (5.0, 0.2, 2.0),
    "small": (2.0, 0.9, 5.0),
    "as small, worse": (2.0, 1.1, 5.0),
}


def test_front_is_what_nothing_beats_in_size_and_divergence():
    assert advanced_plots.front(POINTS) == ["small", "good", "16 bits"]


def test_pareto_shows_every_point_with_an_area_for_its_seconds():
    axis = advanced_plots.pareto(POINTS, "").axes[0]
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axis.texts] == list(POINTS)
    sizes = [dots.get_sizes()[0] for dots in axis.collections]
    assert max(sizes) == sizes[1] and min(sizes) == sizes[0]
    assert list(axis.lines[0].get_xdata()) == [2.0, 4.0, 16.0]
