"""The grader itself: planted faults lose points, correct answers written otherwise keep them all."""

import importlib
import json

import pytest

from tools.exercises import master, trials


@pytest.mark.parametrize("lab", master.LABS)
def test_faults_lose_points_doing_nothing_gets_none_and_correct_variants_keep_them(lab):
    outcomes = trials.run(lab)
    for name, outcome in outcomes.items():
        kept = [fault for fault, gained in outcome["faults"].items() if gained >= outcome["points"]]
        lost = [variant for variant, gained in outcome["variants"].items() if gained < outcome["points"]]
        assert not kept, f"{name}: not noticed"
        assert not any(outcome["nothing"].values()), f"{name}: {outcome['nothing']}"
        assert not lost, f"{name}: correct, and marked down"
    recorded = json.loads(trials.FILE.read_text(encoding="utf-8"))[lab]
    assert outcomes == recorded, "run: .venv/bin/python -m tools.exercises trials"


@pytest.mark.parametrize("lab", master.LABS)
def test_no_student_draws_inputs_on_which_the_solution_fails(lab, monkeypatch):
    monkeypatch.setattr(trials, "WHO", [f"student {number}" for number in range(12)])
    chosen, checker = master.load(lab), trials.Checker(master.load(lab))
    for task in chosen.tasks.values():
        if task.lacking:
            continue
        assert trials.points(chosen, checker, task, task.solution) == task.points, task.name


@pytest.mark.parametrize("lab", master.LABS)
def test_every_task_has_five_faults_and_three_variants(lab):
    planted = importlib.import_module(f"tools.exercises.trials_{lab.replace('.', '_')}")
    names = list(master.load(lab).tasks)
    assert list(planted.FAULTS) == list(planted.VARIANTS) == names
    assert all(len(faults) >= 5 for faults in planted.FAULTS.values())
    assert all(len(variants) >= 3 for variants in planted.VARIANTS.values())


def test_a_change_that_changes_nothing_is_an_error():
    with pytest.raises(ValueError, match="does not hold"):
        trials.changed("return 1", [("return 2", "return 3")])
