"""For the book's tests: what they need comes with `make book`; in `make test` they fail without it, else they skip."""

import os
from importlib.util import find_spec

import pytest


def require_sphinx() -> None:
    """Skip the module that calls this where the book's packages are not installed."""
    if find_spec("sphinx") is None and not os.environ.get("COURSE_ENGINES"):
        pytest.skip("The book's packages are not installed: make book", allow_module_level=True)
