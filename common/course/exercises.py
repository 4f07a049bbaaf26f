"""What an exercise notebook tries a student's functions with: checks on random inputs that the student's name draws.

A check is a function of the functions under test and a generator. It raises AssertionError with a message that says
what is wrong and not the answer, and may return a sentence with what it measured.
"""

import copy
import importlib.util
import math
import traceback
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

Check = Callable[..., str | None]


def worth(points: int, after: Check | None = None) -> Callable[[Check], Check]:
    """Say how many points a check gives; with `after`, only to those whom that check gave its points.

    What an ablation asks for, an answer that does nothing often fulfils: it says something of right answers alone.
    """

    def mark(check: Check) -> Check:
        check.points, check.after = points, after
        return check

    return mark


def in_vain(check: Check, passed: list[Check]) -> str:
    """Why a check that holds gives nothing; "" where it gives its points. passed: those that gave theirs."""
    if check.after is None or check.after in passed:
        return ""
    return f"It holds, but counts only with this: {check.after.__doc__}"


def generator(check: Check, who: str) -> torch.Generator:
    """The random inputs of one check for one student: the same ones every time, others for everybody else."""
    return torch.Generator().manual_seed(zlib.crc32(f"{who}/{check.__name__}".encode()))


def untouched(function: Callable) -> Callable:
    """`function` on copies of its arguments, so that one check cannot spoil the next."""
    return lambda *args, **kwargs: function(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def lacking(needs: str) -> str:
    """Why a task that needs a package is skipped here, as a sentence; "" where it is not."""
    if not needs or importlib.util.find_spec(needs):
        return ""
    return f"Skipped: {needs} is not installed. To have it: .venv/bin/pip install {needs}"


def try_out(who: str, functions: list[Callable], *checks: Check, needs: str = "") -> None:
    """Run the checks in a notebook; a line for each, and the points. needs: a package, else all are skipped."""
    if why := lacking(needs):
        print(f"➖ {why}")
        return
    passed: list[Check] = []
    for check in checks:
        try:
            said = check(*map(untouched, functions), generator(check, who))
        except NotImplementedError:
            print(f"➖ {check.__doc__} Not written yet.")
        except AssertionError as error:
            print(f"❌ {check.__doc__} {error}")
        except Exception as error:  # the answer's own: the other checks still run
            print(f"❌ {check.__doc__} {_raised(error)}")
        else:
            if why := in_vain(check, passed):
                print(f"❌ {check.__doc__} {why}")
                continue
            passed.append(check)
            print(f"✅ {check.__doc__} {said or ''}".rstrip())
    print(f"{sum(check.points for check in passed)} / {sum(check.points for check in checks)}")


def _raised(error: Exception) -> str:
    """An exception in one line, with the last place in code that is no library's."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"It raised {type(error).__name__}: {error} (line {own[-1].lineno} of the cell, in {own[-1].name})"


def typed(actual: object, dtype: torch.dtype, what: str) -> None:
    """Raise AssertionError unless `actual` is a tensor of this dtype."""
    assert isinstance(actual, Tensor), f"{what} should be a tensor, not {type(actual).__name__}."
    assert actual.dtype == dtype, f"{what} should be {str(dtype)[6:]}, not {str(actual.dtype)[6:]}."


def close(actual: object, expected: object, what: str, tolerance: float = 1e-4, ask: str = "") -> None:
    """Raise AssertionError unless `actual` is a tensor (or number) of the expected shape and about its values.

    ask: what to ask oneself where values are wrong.
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
    assert not wrong, f"{what} is wrong in {wrong} of {expected.numel()} places. {ask}".rstrip()


def error_at_output(weight: Tensor, approximation: Tensor, inputs: Tensor) -> float:
    """Relative squared error at the output of a layer [out, in] for inputs [tokens, in]."""
    weight, approximation, inputs = weight.double(), approximation.double(), inputs.double()
    return (((approximation - weight) @ inputs.T).square().sum() / (weight @ inputs.T).square().sum()).item()


def pair(result: object, what: str, count: int = 2) -> tuple:
    """`result` as a tuple of `count`; AssertionError where it is not."""
    assert isinstance(result, tuple | list) and len(result) == count, f"{what} should return {count} values."
    return tuple(result)
