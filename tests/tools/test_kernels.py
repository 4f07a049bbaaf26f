"""What a dead kernel died of: memory only where something says so."""

import pytest

from tools import kernels


def write(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


V2 = {"proc/self/cgroup": "0::/course\n", "sys/fs/cgroup/course/memory.events": "low 0\noom 1\noom_kill 3\n"}
V1 = {
    "proc/self/cgroup": "4:memory:/course\n0::/\n",
    "sys/fs/cgroup/memory/course/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
}
MACHINE = {"proc/vmstat": "nr_free_pages 9\noom_kill 1\n"}


@pytest.mark.parametrize(
    ("files", "count"), [(V2 | MACHINE, 3), (V1 | MACHINE, 2), (MACHINE, 1), ({}, 0)], ids=["v2", "v1", "none", "macOS"]
)
def test_kills_are_counted_in_our_control_group_first(tmp_path, files, count):
    write(tmp_path, files)
    assert kernels.out_of_memory_kills(tmp_path) == count


def died(monkeypatch, status, *, lowest=0.5, kills=0):
    monkeypatch.setattr(kernels, "out_of_memory_kills", lambda: 0)
    watch = kernels.Watch(lowest=lowest)
    watch.look(status)
    monkeypatch.setattr(kernels, "out_of_memory_kills", lambda: kills)
    return kernels.cause_of_death(watch)[0]


def test_memory_is_named_only_with_evidence(monkeypatch):
    assert died(monkeypatch, -9) == "was killed from outside (SIGKILL)"
    assert died(monkeypatch, -9, kills=1).startswith("was killed because the main memory was full (SIGKILL: the system")
    assert "0.01 of" not in died(monkeypatch, -9, lowest=0.5)
    assert died(monkeypatch, -9, lowest=0.001).startswith(
        "was killed because the main memory was full (SIGKILL: at the"
    )
    assert died(monkeypatch, -15) == "was killed from outside (SIGTERM)"


@pytest.mark.parametrize(("status", "name"), [(-11, "SEGV"), (-7, "BUS"), (-4, "ILL"), (-8, "FPE"), (-6, "ABRT")])
def test_a_crash_is_no_want_of_memory(monkeypatch, status, name):
    """Even where the memory is full at the same time."""
    assert died(monkeypatch, status, lowest=0.0, kills=5) == f"crashed in native code (SIG{name})"


def test_the_first_status_counts(monkeypatch):
    """nbclient asks again after the process was reaped, and the provisioner then says 0."""
    watch = kernels.Watch()
    for status in (None, -11, 0):
        watch.look(status)
    assert watch.status == -11


@pytest.mark.parametrize("error", ["MemoryError: ", "OutOfMemoryError: CUDA", "RuntimeError: can't allocate memory: 9"])
def test_errors_that_mean_want_of_memory(error):
    assert kernels.NO_MEMORY.search(error)
    assert not kernels.NO_MEMORY.search("ValueError: memory of the student")
