"""Both engines are what the service asks of one."""

import inspect

import pytest

from common.serving.backend import HttpEngine
from common.serving.engine import TransformersEngine
from common.serving.service import Engine


@pytest.mark.parametrize("kind", [TransformersEngine, HttpEngine])
def test_an_engine_has_what_the_service_calls(kind):
    asked = {name: method for name, method in vars(Engine).items() if inspect.isfunction(method) and name[0] != "_"}
    assert len(asked) == 6
    for name, method in asked.items():
        found = getattr(kind, name)
        assert len(inspect.signature(found).parameters) == len(inspect.signature(method).parameters), name
        assert inspect.iscoroutinefunction(found) == inspect.iscoroutinefunction(method), name
