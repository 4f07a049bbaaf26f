"""The limits of a device, and timing of work whose data is not in the cache."""

import pytest
import torch

from common.measure.roofline import Roofline, cold_seconds, measure_roofline

CPU = torch.device("cpu")


def test_the_later_of_reading_and_computing_is_the_limit():
    roofline = Roofline(bandwidth=100.0, rate=1000.0, cache=0)
    assert roofline.seconds(50, 100) == pytest.approx(0.5)  # reading
    assert roofline.seconds(50, 900) == pytest.approx(0.9)  # computing


def test_copies_fill_the_cache_four_times():
    roofline = Roofline(1.0, 1.0, cache=50)
    assert [roofline.copies(size) for size in (10, 66, 200, 1000)] == [20, 4, 1, 1]
    assert Roofline(1.0, 1.0, cache=0).copies(10) == 1


def test_a_device_has_limits():
    found = measure_roofline(CPU, torch.float32)
    assert 1e8 < found.bandwidth < 1e13
    assert 1e8 < found.rate < 1e15
    assert found.cache == 0


def test_the_copies_take_turns_and_the_time_is_that_of_one(monkeypatch):
    turns = []
    runs = [lambda name=name: turns.append(name) for name in "abc"]
    ticks = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: 6.0 * next(ticks))
    assert cold_seconds(runs, CPU) == 2.0
    assert "".join(turns) == "abc" * 4  # a warm-up and three timed passes
