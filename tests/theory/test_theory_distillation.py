"""The worked numbers of theory/3.3: its blocks are run again, and its table computed a second time with `common`."""

import re

import pytest
import torch
from theory_tools import WORKED, read, run_blocks
from torch.nn import functional as F
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from common.methods.distillation import distillation_loss, kd_loss, top_k_kd_loss
from common.methods.soft_labels import top_k_and_tail

NAME = "3.3-Knowledge_Distillation"
TEXT = read(NAME)
NUMBER = re.compile(r"−?\d+\.\d{4}(?!\d)")


@pytest.fixture
def blocks() -> tuple[dict, list[tuple[str, str]]]:
    return run_blocks(NAME)


def differentiate(loss, z: torch.Tensor) -> torch.Tensor:
    z = z[None].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    return gradient[0]


def by_common(t: torch.Tensor, z: torch.Tensor) -> list[list[float]]:
    """The rows of the document's table, from `common.methods.distillation`; token 0 is the answer."""
    y = torch.tensor([0])

    def ce(z):
        return F.cross_entropy(z, y, reduction="sum")

    def kd(temperature):
        return lambda z: kd_loss(z, t[None], temperature)

    def top_2(z):
        ids, log_probs = top_k_and_tail(t[None], 2, 1.0)
        return top_k_kd_loss(z, ids, log_probs.to(z.dtype), 1.0)

    values = [
        ce(z[None]),
        kd(1)(z[None]),
        kd(2)(z[None]) / 4,
        kd(2)(z[None]),
        distillation_loss(ce(z[None]), kd(2)(z[None]), alpha=0.5),
        kd_loss(t[None], z[None], 1),  # the roles exchanged: reverse KL
        top_2(z[None]),
    ]
    gradients = [differentiate(loss, z).tolist() for loss in (ce, kd(1), kd(2), top_2)]
    return [[value.item()] for value in values] + gradients


def check_table(text: str, expected: list[list[float]]) -> None:
    """Raise AssertionError unless the table's numbers are `expected`, to the four decimals it shows."""
    (table,) = WORKED.findall(text)
    rows = [NUMBER.findall(line) for line in table.splitlines()[2:]]
    assert rows == [[f"{value:.4f}".replace("-", "−") for value in row] for row in expected]


def test_the_table_is_what_common_computes(blocks):
    names = blocks[0]
    check_table(TEXT, by_common(names["t"], names["z"]))


@pytest.mark.parametrize(("old", "new"), [("| 0.9579 |", "| 0.9759 |"), ("、0.0168、", "、−0.0168、")])
def test_a_changed_number_is_noticed(blocks, old, new):
    names = blocks[0]
    assert old in TEXT
    with pytest.raises(AssertionError):
        check_table(TEXT.replace(old, new), by_common(names["t"], names["z"]))


def test_four_decimals_in_the_text_are_ones_that_were_computed(blocks):
    """Up to the exercises, whose answers show their own arithmetic."""
    prose = re.sub(r"```.*?```", "", TEXT.split("## 7. ")[0], flags=re.DOTALL)
    prose = re.sub(r"<!-- results:.*?<!-- /results -->", "", prose, flags=re.DOTALL)
    names = blocks[0]
    known = {f"{value:.4f}" for row in by_common(names["t"], names["z"]) for value in row}
    known |= set(re.findall(r"-?\d+\.\d{4}", "".join(printed for printed, _ in blocks[1])))
    assert {number.replace("−", "-") for number in NUMBER.findall(prose)} <= known


def test_gradients_of_the_reverse_divergence_and_of_a_forgotten_tail(blocks):
    names = blocks[0]
    t, z, p, q = names["t"], names["z"], names["p"], names["q"]
    reverse = differentiate(lambda z: kd_loss(t[None], z, 1), z)  # KL of the softmax of z, from that of t
    torch.testing.assert_close(reverse, q * ((q / p).log() - names["reverse_kl"]))
    forgotten = torch.cat((t[:2], torch.full((2,), -torch.inf, dtype=t.dtype))).softmax(-1)
    torch.testing.assert_close(forgotten, names["forgotten"])
    at_teacher = differentiate(lambda z: F.cross_entropy(z, forgotten[None], reduction="sum"), t)
    torch.testing.assert_close(at_teacher, p - forgotten)
    torch.testing.assert_close(differentiate(lambda z: kd_loss(z, t[None], 1), t), torch.zeros(4, dtype=t.dtype))


@pytest.mark.parametrize(("layers", "name"), [(30, "teacher_parameters"), (15, "student_parameters")])
def test_parameters_are_those_of_the_architecture(blocks, layers, name):
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, vocab_size=49_152, num_hidden_layers=layers, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == blocks[0][name]


def test_bert_of_six_layers_has_the_parameters_it_says():
    with torch.device("meta"):
        model = BertModel(BertConfig(num_hidden_layers=6))
    assert f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M" in TEXT
    with torch.device("meta"):
        smaller = BertModel(BertConfig(num_hidden_layers=4), add_pooling_layer=False)
    assert f"{sum(p.numel() for p in smaller.parameters()) / 1e6:.2f} M" in TEXT  # what the web takes for it
