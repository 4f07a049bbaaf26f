"""What an answer may not hold is told by name."""

import pytest

from tools.exercises.rules import broken


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("from common.methods.pruning import sparsegpt", "imports common.methods.pruning"),
        ("import tools.exercises", "imports tools.exercises"),
        ("def f():\n    import os", "imports os"),
        ("exit()", "uses exit()"),
        ("def f():\n    raise SystemExit", "ends the program"),
        ("__import__('common')", "uses __import__()"),
        ("torch.allclose = lambda *a, **k: True", "replaces torch.allclose"),
        ("t = torch\nt.allclose, x = 1, 2", "replaces t.allclose"),
        ("setattr(torch, 'allclose', f)", "uses setattr()"),
        ("del torch.equal", "replaces torch.equal"),
        ("(lambda: 0).__globals__", "uses __globals__"),
        ("def f(:", "is not Python"),
        ("F.kl_div(p, q)", "uses kl_div"),
        ("kl_div = F.kl_div", "uses kl_div"),
        ("from torch.nn.functional import kl_div as divergence", "uses kl_div"),
    ],
)
def test_told(source, said):
    assert said in broken(source, without=["kl_div"])


def test_what_answers_need_is_allowed():
    source = """
import math
import numpy as np
from torch import nn
class Model(nn.Module):
    def forward(self, x):
        self.seen = x
        return x
def f(w):
    w.requires_grad = True
    w.grad = None
    w[0] = 1
    return w
"""
    assert broken(source, without=["kl_div"]) == ""


def test_a_function_of_the_answers_own_may_have_the_name():
    own = "def kl_div(p, q):\n    return p\n\ndef f(grad):\n    return kl_div(grad, 1)"
    assert broken(own, without=["kl_div", "grad"]) == ""
