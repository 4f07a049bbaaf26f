"""The worked numbers of theory/3.1: its blocks are run again, and its table computed a second time with `common`."""

import re
from functools import partial
from itertools import product
from math import isclose

import pytest
import torch
from theory_tools import WORKED, read, run_blocks
from transformers import LlamaConfig, LlamaForCausalLM

from common.formats.gptq import pack_linear
from common.methods import quantization
from common.methods.awq import channel_scale
from common.methods.blocks import iter_linears
from common.methods.compensation import Hessian, inverse_cholesky, output_error
from common.methods.quantization import QuantizeConfig, gptq, rtn
from tools.tables import committed

NAME = "3.1-Quantization"
TEXT = read(NAME)
NUMBER = re.compile(r"[−-]?\d+\.\d{4}(?!\d)")
PLAIN = QuantizeConfig(bits=2, group_size=3, sym=False, desc_act=False, mse=False, damp_percent=0.01)
ACT = QuantizeConfig(bits=2, group_size=3, sym=False, desc_act=True, mse=False, damp_percent=0.01)


@pytest.fixture
def blocks() -> tuple[dict, list[tuple[str, str]]]:
    return run_blocks(NAME)


def in_turn(W: torch.Tensor, H: torch.Tensor, nearest) -> tuple[torch.Tensor, torch.Tensor]:
    """Each column as it stands when its turn comes, and rounded, from the least-squares problem itself: what the
    columns from j on must become so that the output error is lowest, given the columns before j as they were rounded.
    """
    seen, rounded = torch.zeros_like(W), torch.zeros_like(W)
    for j in range(len(H)):
        change = W[:, :j] - rounded[:, :j]
        left = W[:, j:] + change @ H[:j, j:] @ torch.linalg.inv(H[j:, j:])
        seen[:, j] = left[:, 0]
        rounded[:, j] = nearest(left[:, 0])
    return seen, rounded


def by_common(W: torch.Tensor, X: torch.Tensor) -> list[list[float]]:
    """The rows of the document's table, from `common` in its float32; W [out, in], X [in, tokens]."""
    weight, statistic = W.float(), Hessian(len(X), X)
    statistic.add(X.T.float().contiguous())
    H = statistic.matrix
    order = H.diagonal().argsort(descending=True)
    U, U_act = inverse_cholesky(H, 0.01), inverse_cholesky(H[order][:, order], 0.01)
    results = [rtn(weight, PLAIN), gptq(weight, H, PLAIN), gptq(weight, H, ACT)]
    weights = [result.dequantize() for result in results]
    scale, zero = results[0].scale[:, 0].float(), results[0].zero[:, 0].float()
    damping = 0.01 * H.diagonal().mean()
    damped = H + damping * torch.eye(3)
    turns, rounded = in_turn(
        weight, damped, lambda column: scale * ((column / scale + zero).round().clamp(0, 3) - zero)
    )
    torch.testing.assert_close(rounded, weights[1])
    errors = (turns - rounded) / U.diagonal()
    size = (weight @ H * weight).sum().item() / 2  # output_error is relative to this
    losses = [output_error(weight, found, H) * size for found in weights]
    upper = torch.triu_indices(3, 3).unbind()
    return [
        H[upper].tolist(),
        [damping.item()],
        torch.linalg.inv(damped)[upper].tolist(),
        U[upper].tolist(),
        (U.diagonal() ** -2).tolist(),
        (U_act.diagonal() ** -2).tolist(),
        turns[:, 1].tolist(),
        turns[:, 2].tolist(),
        errors.flatten().tolist(),
        *(found.flatten().tolist() for found in weights),
        [*losses, exhaustive(W, scale.double(), zero.double(), H.double())],
        [(weight - found).square().sum().item() for found in weights],
        [errors.square().sum().item() / 2],
    ]


def exhaustive(W, scale, zero, H) -> float:
    """The lowest loss of all grid points, row by row."""
    total = 0.0
    for row, s, z in zip(W, scale, zero, strict=True):
        changes = [row - s * (torch.tensor(codes, dtype=torch.float64) - z) for codes in product(range(4), repeat=3)]
        total += min((change @ H @ change).item() / 2 for change in changes)
    return total


def check_table(text: str, expected: list[list[float]]) -> None:
    """Raise AssertionError unless the table's numbers are `expected`, to the four decimals it shows."""
    (table,) = WORKED.findall(text)
    rows = [[float(n.replace("−", "-")) for n in NUMBER.findall(line)] for line in table.splitlines()[2:]]
    assert [len(row) for row in rows] == [len(row) for row in expected]
    for row, values in zip(rows, expected, strict=True):
        assert row == pytest.approx(values, abs=6e-5)


def test_the_table_is_what_common_computes(blocks):
    names = blocks[0]
    check_table(TEXT, by_common(names["W"], names["X"]))


@pytest.mark.parametrize(("old", "new"), [("0.6828、0.6487", "0.6828、0.6478"), ("−0.7050", "0.7050")])
def test_a_changed_number_is_noticed(blocks, old, new):
    names = blocks[0]
    (table,) = WORKED.findall(TEXT)
    assert old in table
    with pytest.raises(AssertionError):
        check_table(TEXT.replace(table, table.replace(old, new)), by_common(names["W"], names["X"]))


def test_four_decimals_in_the_text_are_ones_that_were_computed(blocks):
    """Up to the exercises, whose answers show their own arithmetic; bits per weight are checked on their own."""
    prose = re.sub(r"```.*?```", "", TEXT.split("## 7. ")[0], flags=re.DOTALL)
    prose = re.sub(r"<!-- (results:\S+|worked) -->.*?<!-- /\w+ -->", "", prose, flags=re.DOTALL)
    known = set(re.findall(r"-?\d+\.\d{4}", "".join(printed for printed, _ in blocks[1])))
    found = {number.replace("−", "-") for number in NUMBER.findall(prose)}
    assert "-0.7050" in found
    assert found - {"4.3125"} <= known


def test_without_act_order_and_with_it_the_codes_are_those_of_common(blocks):
    names = blocks[0]
    H = names["H"].float()
    for config, found in ((PLAIN, names["W_hat"]), (ACT, names["W_act"])):
        torch.testing.assert_close(gptq(names["W"].float(), H, config).dequantize().double(), found)


@pytest.mark.parametrize("start", range(3))
def test_one_factor_holds_every_inverse(start):
    """The proposition of 2.7, on a matrix of its own."""
    root = torch.randn(3, 5, generator=torch.Generator().manual_seed(start), dtype=torch.float64)
    H = root @ root.T
    U = inverse_cholesky(H, 1e-12)
    torch.testing.assert_close(torch.linalg.inv(H[start:, start:]), U[start:, start:].T @ U[start:, start:])
    rest = range(start + 1, 3)
    left = H[start, start] - H[start, rest] @ torch.linalg.inv(H[rest][:, rest]) @ H[rest, start] if rest else None
    assert left is None or isclose(left.item(), U[start, start].item() ** -2, rel_tol=1e-6)


def test_columns_in_blocks_give_the_same_codes(monkeypatch):
    """Lazy batches change the speed, not the result."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = torch.randn(4, 24, generator=generator), torch.randn(24, 100, generator=generator)
    H = 2 * inputs @ inputs.T / 100
    whole = gptq(weight, H, QuantizeConfig(4, 24))
    monkeypatch.setattr(quantization, "compensate", partial(quantization.compensate, block_columns=5))
    assert torch.equal(gptq(weight, H, QuantizeConfig(4, 24)).codes, whole.codes)


def test_the_scale_of_awq_is_a_power_of_the_activations(blocks):
    loudness = blocks[0]["inputs"].abs().mean(1)
    scale = channel_scale(loudness, 0.3)
    torch.testing.assert_close(scale / scale.min(), loudness**0.3 / (loudness**0.3).min())


@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_bits_per_weight_are_those_of_the_packed_tensors(group_size):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    packed = pack_linear(rtn(weight, QuantizeConfig(4, group_size)))
    stored = 8 * sum(tensor.nbytes for name, tensor in packed.items() if name != "g_idx") / weight.numel()
    assert stored == 4 + (16 + 4) / group_size
    assert f"{stored:g}" in TEXT or f"{stored:.5f}" in TEXT


def test_bytes_are_those_of_the_architecture_and_of_the_files(blocks):
    names = blocks[0]
    shape = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(**shape, vocab_size=49_152, num_hidden_layers=30, tie_word_embeddings=True)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    assert names["original"] == 2 * sum(p.numel() for p in model.parameters())
    assert names["linear"] == sum(linear.weight.numel() for _, linear in iter_linears(model))
    assert names["parts"]["g_idx"] == 4 * sum(linear.in_features for _, linear in iter_linears(model))
    sizes = {r["artifact"]: r["value"] for r in committed() if (r["lab"], r["key"]) == ("quantization", "bytes")}
    for file, tensors in ((sizes["original"], names["original"]), (sizes["gptq"], sum(names["parts"].values()))):
        assert 0 < file - tensors < 200_000, "a file is its tensors and a header"


def test_numbers_of_the_groups_largest_weights(blocks):
    """2.60 and 2.09 standard deviations, as section 2.2 and exercise 2 use them."""
    for size, stated in ((64, "2.60"), (16, "2.09")):
        largest = blocks[0]["w"][: 4000 * size].view(-1, size).abs().amax(1).mean()
        assert abs(largest.item() - float(stated)) < 0.02
        assert stated in TEXT


def test_exercise_3():
    """GPTQ on integers, with two correlated inputs."""
    W, H = torch.tensor([[0.6, 0.6]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    seen, found = in_turn(W, H, torch.round)
    torch.testing.assert_close(seen, torch.tensor([[0.6, 0.4]]))
    assert found.tolist() == [[1.0, 0.0]]
    loss = [((W - q) @ H * (W - q)).sum().item() / 2 for q in (W.round(), found)]
    assert loss == pytest.approx([0.48, 0.28], abs=1e-6)
