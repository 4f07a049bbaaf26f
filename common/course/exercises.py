"""What an exercise notebook tries a student's functions with: checks on random inputs that the student's name draws.

A check is a function of the functions under test and a generator. It raises AssertionError with a message that says
what is wrong and not the answer, and may return a sentence with what it measured.
"""

import copy
import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

Check = Callable[..., str | None]


def worth(points: int) -> Callable[[Check], Check]:
    """Say how many points a check gives."""

    def mark(check: Check) -> Check:
        check.points = points
        return check

    return mark


def generator(check: Check, who: str) -> torch.Generator:
    """The random inputs of one check for one student: the same ones every time, others for everybody else."""
    return torch.Generator().manual_seed(zlib.crc32(f"{who}/{check.__name__}".encode()))


def untouched(function: Callable) -> Callable:
    """`function` on copies of its arguments, so that one check cannot spoil the next."""
    return lambda *args, **kwargs: function(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def try_out(who: str, functions: list[Callable], *checks: Check) -> None:
    """Run the checks in a notebook; a line for each, and the points."""
    gained = 0
    for check in checks:
        try:
            said = check(*map(untouched, functions), generator(check, who))
        except NotImplementedError:
            print(f"➖ {check.__doc__} Not written yet.")
        except AssertionError as error:
            print(f"❌ {check.__doc__} {error}")
        else:
            gained += check.points
            print(f"✅ {check.__doc__} {said or ''}".rstrip())
    print(f"{gained} / {sum(check.points for check in checks)}")


def close(actual: object, expected: object, what: str, tolerance: float = 1e-4) -> None:
    """Raise AssertionError unless `actual` is a tensor (or number) of the expected shape and about its values.

    tolerance: relative to the largest expected value: float32 sums over a few hundred terms agree to about 1e-6.
    """
    expected = torch.as_tensor(expected)
    if isinstance(actual, int | float):
        actual = torch.tensor(actual, dtype=torch.float64)
    assert isinstance(actual, Tensor), f"{what} should be a tensor, not {type(actual).__name__}."
    assert actual.shape == expected.shape, f"{what} has shape {list(actual.shape)}, not {list(expected.shape)}."
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.isfinite().all(), f"{what} holds NaN or inf."
    limit = tolerance * expected.abs().max().clamp(min=math.ulp(1.0)) if expected.numel() else 0.0
    wrong = ((actual - expected).abs() > limit).sum()
    assert not wrong, f"{what} is wrong in {wrong} of {expected.numel()} places."


def pair(result: object, what: str, count: int = 2) -> tuple:
    """`result` as a tuple of `count`; AssertionError where it is not."""
    assert isinstance(result, tuple | list) and len(result) == count, f"{what} should return {count} values."
    return tuple(result)
