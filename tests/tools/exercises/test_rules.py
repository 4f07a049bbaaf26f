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
