"""What an exercise notebook tries answers with: points, messages, and errors that stop nothing."""

import pytest
import torch

from common.course.exercises import close, try_out, typed, worth


@worth(2)
def main_check(function, rng):
    """It doubles."""
    assert function(2) == 4, "It does not."
    return "As it should."


@worth(1, after=main_check)
def ablation(function, rng):
    """Zero stays zero."""
    assert function(0) == 0


def test_points_and_what_was_measured(capsys):
    try_out("amy", [lambda x: 2 * x], main_check, ablation)
    assert capsys.readouterr().out == "✅ It doubles. As it should.\n✅ Zero stays zero.\n3 / 3\n"


def test_an_ablation_gives_nothing_without_its_main_check(capsys):
    try_out("amy", [lambda x: x], main_check, ablation)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("❌ It doubles. It does not.")
    assert said[-2:] == ["❌ Zero stays zero. It holds, but counts only with this: It doubles.", "0 / 3"]


def test_an_error_in_one_check_stops_no_other(capsys):
    def inverse(x):
        return 1 / x if x == 0 else 2 * x

    try_out("amy", [inverse], main_check, ablation)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("✅")
    assert "It raised ZeroDivisionError: division by zero (line " in said[1] and "in inverse)" in said[1]
    assert said[2] == "2 / 3"


def test_a_dtype_is_told_by_name():
    with pytest.raises(AssertionError, match="codes should be uint8, not int64"):
        typed(torch.zeros(2, dtype=torch.int64), torch.uint8, "codes")
    with pytest.raises(AssertionError, match="codes should be a tensor, not list"):
        typed([1], torch.uint8, "codes")


def test_wrong_values_ask_what_to_look_at():
    with pytest.raises(AssertionError, match=r"H is wrong in 1 of 1 places. Is it 2/n\?"):
        close(1.0, 2.0, "H", ask="Is it 2/n?")
