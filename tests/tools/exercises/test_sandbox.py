"""What an answer does to its process is told by its true name and does not reach ours."""

import pytest
import torch

from tools.exercises.sandbox import GIB, Sandbox, Stopped, Wrong

SECRET = "a text that only this process knows"


def run(cell, *args, seconds=20):
    with Sandbox("import torch", cell, seconds, GIB) as sandbox:
        return sandbox.call("f", args, {})


def test_tensors_and_lists_go_there_and_back():
    found = run("def f(x, n):\n    return {'sum': x + n, 'list': (x, 1.5, 'a', None, True)}", torch.ones(3), 2)
    assert found["sum"].tolist() == [3, 3, 3]
    assert found["list"][1:] == (1.5, "a", None, True)


def test_numbers_of_other_kinds_come_back_as_numbers():
    cell = "import enum, numpy\nclass A(int):\n    pass\ndef f():\n    return [numpy.float64(1.5), A(2), True]"
    found = run(cell)
    assert found == [1.5, 2, True] and list(map(type, found)) == [float, int, bool]


@pytest.mark.parametrize(
    ("body", "error", "said"),
    [
        ("while True: pass", Stopped, "longer than 3 s"),
        ("exit()", Stopped, "exit()"),
        ("import os; os._exit(3)", Stopped, "ended its own process (exit status 3)"),
        ("import os; os.abort()", Stopped, "SIGABRT"),
        ("return torch.zeros(10**10)", Wrong, "more memory"),
        ("return bytearray(10**12)", Wrong, "more memory"),
        ("import socket; socket.create_connection(('127.0.0.1', 9))", Wrong, "PermissionError"),
        ("import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')", Wrong, "an answer may not use socket"),
        ("import subprocess; subprocess.run(['true'])", Wrong, "PermissionError"),
        ("import os; os.system('true')", Wrong, "PermissionError"),
        ("import os; os.fork()", Wrong, "PermissionError"),
        ("open('note.txt', 'w')", Wrong, "may not open files"),
        ("return open('/etc/hostname').read()", Wrong, "may not open files"),
        ("from common.methods import pruning", Wrong, "common"),
        ("import tools.exercises.master", Wrong, "tools"),
        ("return object()", Wrong, "It returned object, not tensors, numbers or texts."),
        ("import numpy; return numpy.zeros(3)", Wrong, "It returned ndarray, not tensors, numbers or texts."),
        ("return {f: 1}", Wrong, "It returned function, not tensors, numbers or texts."),
        ("return x +", Wrong, "SyntaxError"),
        ("return 1 / 0", Wrong, "ZeroDivisionError"),
    ],
)
def test_told_by_name(body, error, said):
    with pytest.raises(error) as raised:
        run(f"def f():\n    {body}", seconds=3)
    assert said in str(raised.value)


def test_a_cell_without_the_function_says_so():
    with pytest.raises(Wrong, match="defines no function f"):
        run("def g():\n    return 1")


def test_a_blank_is_no_error():
    with pytest.raises(NotImplementedError):
        run("def f():\n    raise NotImplementedError()")


def test_a_stopped_answer_is_not_asked_again():
    with Sandbox("import torch", "def f():\n    while True: pass", 1, GIB) as sandbox:
        for _ in range(2):
            with pytest.raises(Stopped, match="longer than 1 s"):
                sandbox.call("f", (), {})


def test_what_it_patches_is_patched_there_only():
    assert run("def f():\n    torch.allclose = lambda *a: True\n    return torch.allclose(1, 2)") is True
    assert not torch.allclose(torch.ones(1), torch.zeros(1))


def test_it_holds_nothing_of_ours():
    cell = "def f():\n    import gc, sys\n    texts = [x for x in gc.get_objects() if type(x) is dict]\n"
    cell += "    return [any(d.get('SECRET') for d in texts), 'tools.exercises.master' in sys.modules]"
    assert run(cell) == [False, False]


def test_what_runs_before_the_answer_is_not_counted_as_its_time():
    with Sandbox("import time\ntime.sleep(2)", "def f():\n    return 1", 1, GIB) as sandbox:
        assert sandbox.call("f", (), {}) == 1
