"""Sliders where a reader can move them, pictures where nobody can."""

import pytest

from common.course import front_end


@pytest.fixture(autouse=True)
def recorded(monkeypatch):
    for name in front_end.SERVED_BY:
        monkeypatch.delenv(name, raising=False)


def test_without_a_front_end_every_example_is_drawn():
    drawn = []
    front_end.sliders(lambda bits: drawn.append(bits), [{"bits": 4}, {"bits": 2}], bits=(2, 8, 1))
    assert drawn == [4, 2]


@pytest.mark.parametrize("server", front_end.SERVED_BY)
def test_a_reader_gets_sliders(server, monkeypatch):
    monkeypatch.setenv(server, "1")
    asked = {}
    monkeypatch.setattr("ipywidgets.interact", lambda draw, **ranges: asked.update(ranges))
    front_end.sliders(lambda bits: pytest.fail("drawn"), [{"bits": 4}], bits=(2, 8, 1))
    assert asked == {"bits": (2, 8, 1)}
