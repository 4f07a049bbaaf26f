"""The sweep of learning rates: jobs are done once, validation chooses, and what is recorded is what was measured."""

import json
import math

import pytest
import torch

from benchmarks import students
from benchmarks.students import OBJECTIVES, jobs, read_outcome, sweep_name, winner, work, write_outcome
from common.course.settings import load_settings
from common.measure.evaluation import quality_of
from common.measure.results import read


class Pretended:
    """What a Bench is to a job that trains nothing."""

    def __init__(self, folder, settings):
        self.folder, self.settings, self.tests = folder, settings, torch.zeros(2, 8)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setenv("COURSE_WORK", str(tmp_path))
    return Pretended(tmp_path, load_settings("students", "smoke").replace(notebook="students"))


def outcome(valid, test=2.0):
    """Qualities with these losses: the first test window half a nat easier than the second."""
    nothing = torch.zeros(2, 1, dtype=torch.int32)
    losses = {"valid": [valid, valid], "test": [test - 0.25, test + 0.25]}
    found = {
        split: quality_of(torch.tensor(of_windows, dtype=torch.float64), nothing.bool(), nothing)
        for split, of_windows in losses.items()
    }
    for quality in found.values():
        quality.divergences, quality.top1 = torch.tensor([0.5, 0.7], dtype=torch.float64), 0.5
    return found


def test_outcomes_are_read_as_they_were_written(tmp_path):
    write_outcome(tmp_path, "CE + KD, 0.001, seed 1", outcome(3.0), 1.0)
    again = read_outcome(tmp_path, "CE + KD, 0.001, seed 1")
    assert again["test"].losses.tolist() == [1.75, 2.25]
    assert again["test"].kl == pytest.approx(0.6)
    assert again["valid"].perplexity == pytest.approx(math.exp(3.0))


@pytest.mark.parametrize("profile", ["smoke", "cpu", "gpu"])
def test_every_job_has_a_file_of_its_own(profile, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    settings = load_settings("students", profile)
    files = [students.file_of(tmp_path, job.name) for job in jobs(settings)]
    assert len(set(files)) == len(files)
    assert len([job for job in jobs(settings) if job.name.startswith("CE, ")]) == len(settings.learning_rates)


def test_validation_chooses_the_rate_and_test_does_not(bench):
    low, high = bench.settings.learning_rates
    write_outcome(bench.folder, sweep_name("KD", low, 1), outcome(valid=3.1, test=1.0), 1.0)
    write_outcome(bench.folder, sweep_name("KD", high, 1), outcome(valid=3.0, test=2.0), 1.0)
    assert winner(bench, "KD") == high
    with pytest.raises(RuntimeError, match=r"The sweep lacks CE, .* and nobody is at it"):
        winner(bench, "CE")


def test_a_job_is_done_once_fits_its_time_and_costs_no_other_when_it_fails(bench, monkeypatch, capsys):
    def run(name):
        if name == "bad":
            raise ValueError("not this one")
        begun.append(name)
        return outcome(3.0)

    begun = []
    names = ["bad", "good", "taken", "long"]
    made = [students.Job(n, lambda _, n=n: run(n), 100.0 if n == "long" else 1.0) for n in names]
    monkeypatch.setattr(students, "jobs", lambda _: made)
    students.claim_of(bench.folder, "taken").touch()
    assert work(bench, until=students.time.time() + 50) == ["bad"]
    assert work(bench, until=students.time.time() + 50) == ["bad"]
    assert begun == ["good"]
    assert not students.claim_of(bench.folder, "good").exists()


def test_records_are_the_mean_over_seeds_and_the_paired_difference(bench):
    for objective, base in zip(OBJECTIVES, (2.0, 2.2, 1.8), strict=True):
        for rate in bench.settings.learning_rates:
            write_outcome(bench.folder, sweep_name(objective, rate, 1), outcome(3.0 + rate, base), 1.0)
        write_outcome(bench.folder, f"winner {objective}, seed 2", outcome(3.0, base + 0.1), 1.0)
    students.collect(bench)
    found = {(r["key"], r["artifact"]): r for file in bench.folder.glob("results/*/*/*.json") for r in read(file)}
    assert found["best-rate", "CE"]["value"] == min(bench.settings.learning_rates)
    one, other = (math.exp(loss) for loss in (2.0, 2.1))
    assert found["best-perplexity", "CE"]["value"] == pytest.approx((one + other) / 2)
    assert found["best-difference", "CE + KD"]["value"] == pytest.approx(-0.2)
    # the same difference in both windows, however much these differ in difficulty
    assert found["best-difference", "CE + KD"]["interval"] == pytest.approx([-0.2, -0.2])
    assert json.loads(students.file_of(bench.folder, "winner CE, seed 2").read_text())["seconds"] == 1.0
