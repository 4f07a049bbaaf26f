"""The house: no room imports a higher floor, nothing imports itself in a circle, the map shows what there is."""

from graphlib import CycleError

import pytest

from tools import map as house

GRAPH = house.modules()


def test_no_import_goes_upwards():
    assert house.upward(GRAPH) == []


def test_no_imports_go_in_a_circle():
    house.check_circles(GRAPH)


def test_every_module_stands_in_a_room():
    assert [name for name in GRAPH if not house.room(name) and name != "common"] == []


def test_faults_are_found(tmp_path):
    for name, text in {
        "common/course/a.py": "def f():\n    from common.methods import b\n",
        "common/methods/b.py": "import common.course.a\n",
        "common/methods/__init__.py": "",
        "common/course/__init__.py": "",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    graph = house.modules(tmp_path)
    assert house.upward(graph) == ["common.course.a imports common.methods.b"]
    graph["common.methods.b"].add("common.course.a")
    with pytest.raises(CycleError):
        house.check_circles(graph)


def test_the_map_is_up_to_date():
    assert house.FILE.read_text(encoding="utf-8") == house.draw(GRAPH), "run: make map"
