"""Sliders: every position is drawn where nobody can move one, and moving it draws where somebody can."""

import ipywidgets
import matplotlib.pyplot as plt
import pytest

from common.measure import sliders


@pytest.fixture
def drawn(monkeypatch):
    values = []
    monkeypatch.setattr(plt, "show", lambda: None)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    yield values
    plt.close("all")


def test_without_a_front_end_every_position_is_drawn(drawn, monkeypatch):
    shown = []
    monkeypatch.setattr(sliders, "display", shown.append)
    sliders.explore(drawn.append, "sparsity", [0.3, 0.5, 0.7])
    assert drawn == [0.3, 0.5, 0.7] and not shown


def test_with_one_the_slider_draws_where_it_stands(drawn, monkeypatch):
    shown = []
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")
    monkeypatch.setattr(sliders, "display", shown.append)
    sliders.explore(drawn.append, "sparsity", [0.3, 0.5, 0.7])
    (box,) = shown
    assert isinstance(box, ipywidgets.interactive)
    slider = box.children[0]
    assert (slider.min, slider.value, slider.max) == (0.3, 0.5, 0.7)
    box.update()
    slider.value = 0.6
    assert drawn[0] == 0.5 and drawn[-1] == 0.6
