"""What a notebook claims, checked in the line below the figures.

The course vouches for its embedded model: a false claim stops there. Of a student's own model the course knows
nothing: the cell says what came out differently and the notebook goes on. A stand-in has a published shape and random
weights: it is measured for speed and memory, and claims of quality do not apply to it.

What is no claim but a broken computation (a wrong mask, a file that reads back differently) is `verify`'d, and stops
everywhere.
"""

import json
from pathlib import Path

VOUCHED = ("embedded", "embedded-as-shipped", "layers")  # "layers": a student made of blocks of its teacher
_models = VOUCHED[:1]  # of the notebook that is running; `about` sets them


def about(*models: str) -> None:
    """Say which models the claims to come are about: specs of `common.course.assets`. `prepare` calls it."""
    global _models
    _models = models


def is_stand_in(model: str) -> bool:
    """Whether a model's weights are random: `shape:...`, or a folder whose `artifact.json` says so."""
    description = Path(model) / "artifact.json"
    if model.startswith("shape:"):
        return True
    return description.is_file() and json.loads(description.read_text(encoding="utf-8")).get("method") == "stand-in"


def check(condition: bool, claim: str, *, speed: bool = False) -> None:
    """Check a claim about quality, or about `speed`, which random weights have as well.

    Raises AssertionError where it is false and the course vouches for the model.
    """
    strangers = [model for model in _models if model not in VOUCHED]
    if not speed and any(map(is_stand_in, _models)):
        print(f"➖ does not apply to random weights: {claim}")
    elif condition:
        print(f"✅ {claim}")
    elif strangers:
        print(f"❌ not so with {' and '.join(strangers)}: {claim}. (The course claims it of its embedded model only.)")
    else:
        raise AssertionError(f"This should hold and does not: {claim}")


def verify(condition: bool, what: str) -> None:
    """Check that a computation did what it must, with any model; raises AssertionError where it did not."""
    if not condition:
        raise AssertionError(f"Something is broken: not true that {what}")
    print(f"✅ {what}")
