"""The worked numbers of theory/3.2: its blocks are run again, and its tables computed a second time with `common`."""

import re

import pytest
import torch
from theory_tools import WORKED, read, run_blocks

from common.formats.sparse import csr_bytes, packed_bytes
from common.methods.allocation import by_importance
from common.methods.compensation import inverse_cholesky, output_error
from common.methods.grid import Grid
from common.methods.importance import keep_highest, wanda_scores
from common.methods.pruning import PruneConfig, prune, sparsegpt
from common.methods.quantization import QuantizeConfig, gptq
from tools.tables import committed

NAME = "3.2-Pruning"
TEXT = read(NAME)
NUMBER = re.compile(r"(?<![\d.])\d+\.\d{4}(?!\d)")
METHODS = ("magnitude", "wanda", "sparsegpt")


class Statistic:
    """What `common.methods.pruning` wants to know of a layer's input, from the input itself [in, tokens]."""

    def __init__(self, X: torch.Tensor):
        self.matrix, self.norms = (2 * X @ X.T / X.shape[1]).float(), X.float().norm(dim=1)


class Diagonal(Statistic):
    """The same inputs, as if they had nothing to do with one another."""

    def __init__(self, X: torch.Tensor):
        super().__init__(X)
        self.matrix = self.matrix.diagonal().diag()


@pytest.fixture
def blocks() -> tuple[dict, list[tuple[str, str]]]:
    return run_blocks(NAME)


def config(method: str) -> PruneConfig:
    return PruneConfig(method, 0.5, "2:4", damp_percent=0.0)


def row_losses(W: torch.Tensor, pruned: torch.Tensor, H: torch.Tensor) -> list[float]:
    """Each row's error, from `output_error` (relative) and the row's own output."""
    W, pruned, H = W.float(), pruned.float(), H.float()
    return [output_error(w[None], p[None], H) * ((w @ H) @ w).item() / 2 for w, p in zip(W, pruned, strict=True)]


def digits(mask: torch.Tensor) -> list[str]:
    return ["".join(str(int(kept)) for kept in row) for row in mask.tolist()]


def by_common(W: torch.Tensor, X: torch.Tensor, H: torch.Tensor) -> list[tuple[list[str], list[float]]]:
    """Masks and row losses of the table's first four rows, from `pruning`; of its fifth, by least squares."""
    statistic, rows = Statistic(X), []
    results = {method: prune(W, statistic, config(method)) for method in METHODS}
    for method in ("magnitude", "wanda"):
        pruned, keep = results[method]
        rows.append((digits(keep), row_losses(W, pruned, H)))
    keep = results["wanda"][1]
    compensated, _ = sparsegpt(W, statistic.matrix, lambda _, columns: keep[:, columns], 4, damp_percent=0.0)
    rows.append((digits(keep), row_losses(W, compensated, H)))
    rows.append((digits(results["sparsegpt"][1]), row_losses(W, results["sparsegpt"][0], H)))
    return [*rows, least_squares(W, X)]


def least_squares(W: torch.Tensor, X: torch.Tensor) -> tuple[list[str], list[float]]:
    """The best 2:4 mask of each row and its error, by regressing the output on every pair of inputs."""
    masks, losses = [], []
    for row in W:
        tried = {}
        for a in range(4):
            for b in range(a + 1, 4):
                chosen = X[[a, b]]
                weights = torch.linalg.lstsq(chosen.T, (row @ X)[:, None]).solution[:, 0]
                tried["".join("1" if j in (a, b) else "0" for j in range(4))] = (
                    (row @ X - weights @ chosen).square().mean().item()
                )
        masks.append(min(tried, key=tried.get))
        losses.append(min(tried.values()))
    return masks, losses


def check_table(text: str, expected: list[tuple[list[str], list[float]]]) -> None:
    """Raise AssertionError unless the table shows these masks and numbers, to the four decimals it has."""
    (table,) = WORKED.findall(text)
    for line, (masks, losses) in zip(table.splitlines()[2:], expected, strict=True):
        assert re.findall(r"(?<![\d.])[01]{4}(?![\d.])", line) == masks
        assert NUMBER.findall(line) == [f"{value:.4f}" for value in (*losses, sum(losses))]


def test_the_table_is_what_common_computes(blocks):
    names = blocks[0]
    check_table(TEXT, by_common(names["W"], names["X"], names["H"]))


@pytest.mark.parametrize(("old", "new"), [("| 30.0000 |", "| 30.0001 |"), ("| 0011 |", "| 0101 |")])
def test_a_changed_number_is_noticed(blocks, old, new):
    names = blocks[0]
    assert old in WORKED.findall(TEXT)[0]
    with pytest.raises(AssertionError):
        check_table(TEXT.replace(old, new), by_common(names["W"], names["X"], names["H"]))


def test_scores_masks_and_weights_are_those_of_common(blocks):
    names = blocks[0]
    W, statistic = names["W"], Statistic(names["X"])
    torch.testing.assert_close(names["U"].float(), inverse_cholesky(statistic.matrix, 0.0))
    torch.testing.assert_close(names["wanda_scores"].float(), wanda_scores(W, statistic.norms))
    for method in METHODS:
        pruned, keep = prune(W, statistic, config(method))
        assert torch.equal(keep, names[f"{method}_mask"].bool())
        weights = names["sparsegpt_weights"] if method == "sparsegpt" else W * names[f"{method}_mask"]
        torch.testing.assert_close(pruned, weights.float(), atol=1e-5, rtol=1e-5)


def test_one_threshold_is_the_minimum_without_correlations(blocks):
    names = blocks[0]
    scores = wanda_scores(names["W"], Statistic(names["X"]).norms)
    keep = keep_highest(scores.flatten()[None], 0.5).view(2, 4)
    assert torch.equal(keep, names["whole_mask"].bool())
    diagonal = [(scores.square() * ~mask.bool()).sum() for mask in (names["whole_mask"], names["wanda_mask"])]
    assert diagonal[0] < diagonal[1]


def test_wanda_is_sparsegpt_with_a_diagonal_hessian():
    generator = torch.Generator().manual_seed(0)
    W, X = torch.randn(8, 64, generator=generator), torch.randn(64, 96, generator=generator)
    for pattern in ("2:4", "4:8"):
        settings = {"sparsity": 0.5, "pattern": pattern, "damp_percent": 0.0}
        wanda = prune(W, Diagonal(X), PruneConfig("wanda", **settings))
        sparse = prune(W, Diagonal(X), PruneConfig("sparsegpt", **settings))
        assert torch.equal(wanda[1], sparse[1])
        torch.testing.assert_close(wanda[0], sparse[0])
    free = [prune(W, Diagonal(X), PruneConfig(method, damp_percent=0.0))[1] for method in ("wanda", "sparsegpt")]
    assert not torch.equal(*free)  # they compare within other groups


def test_compensation_column_by_column_may_lose(blocks):
    names = blocks[0]
    row, keep = names["row3"][None], torch.tensor([[False, True, False]])
    H = names["H3"].float()
    weights, _ = sparsegpt(row, H, lambda _, columns: keep[:, columns], damp_percent=0.0)
    (stepwise,) = row_losses(row, weights, H)
    (untouched,) = row_losses(row, row * keep, H)
    assert stepwise == pytest.approx(names["stepwise"], rel=1e-4)
    assert untouched == pytest.approx(names["untouched"].item(), rel=1e-4)
    assert names["jointly"] < untouched < stepwise


@pytest.mark.parametrize("step", [1.22, 2.0])
def test_gptq_refills_zeros_unless_told_not_to(blocks, monkeypatch, step):
    """GPTQ of `common.methods.quantization` on the document's grid: the multiples of `step`."""
    names = blocks[0]
    mask = names["wanda_mask"][:1].bool()
    pruned, hessian = names["W"][:1].float() * mask, Statistic(names["X"]).matrix
    config = QuantizeConfig(bits=4, group_size=4, desc_act=False, mse=False, damp_percent=1e-9)
    grid = Grid(torch.full((1, 1), step), torch.full((1, 1), 8.0), 15)
    monkeypatch.setattr("common.methods.quantization.find_grid", lambda *args, **options: grid)
    for keep, zeros in ((None, 0), (mask, 2)):
        result = gptq(pruned, hessian, config, keep).dequantize().float()
        kept = torch.ones(4, dtype=torch.float64) if keep is None else keep[0].double()
        torch.testing.assert_close(
            result[0], names["quantize"](pruned[0].double(), step, kept).float(), rtol=1e-3, atol=0
        )
        assert (result == 0).sum() == zeros


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_bits_per_weight_are_those_of_the_formats(sparsity):
    weight = torch.ones(64, 256, dtype=torch.bfloat16)
    weight[:, : int(256 * sparsity)] = 0
    shape_and_pointers = {"bitmask": 16, "csr": 4 * 65}
    bits = 8 * (packed_bytes(weight) - shape_and_pointers["bitmask"]) / weight.numel()
    assert bits == (1 - sparsity) * 16 + 1
    bits = 8 * (csr_bytes(weight) - shape_and_pointers["csr"]) / weight.numel()
    assert bits == (1 - sparsity) * (16 + 32)


def test_the_whole_file_is_the_measured_one(blocks):
    """The document computes it for 16-bit values; of 32-bit ones half and a bit each go, too."""
    names = blocks[0]
    layouts: dict[tuple[str, str], dict[str, float]] = {}
    for record in committed():
        if record["key"] == "layout-bytes":
            layouts.setdefault((record["device"], record["protocol"]["dtype"]), {})[record["artifact"]] = record[
                "value"
            ]
    assert layouts
    for (_, dtype), sizes in layouts.items():
        width = {"torch.bfloat16": 16, "torch.float32": 32}[dtype]
        predicted = 1 - names["linear"] * (1 / 2 - 1 / width) / names["parameters"]
        measured = sizes["pruned, bitmask + values"] / sizes["original / pruned, stored dense"]
        assert measured == pytest.approx(predicted, abs=5e-4)


def test_allocation_by_log_costs_is_the_one_of_common(monkeypatch):
    """`by_importance` at the span that equation (9) asks for gives its sparsities."""
    costs, beta = torch.tensor([8.0, 2.0, 1.0, 1.0]), 12.0
    expected = 0.7 - (costs.log() - costs.log().mean()) / beta
    span = (expected.max() - expected.min()).item() / 2
    layers = [(f"model.layers.{block}.mlp.up_proj", None) for block in range(4)]
    monkeypatch.setattr("common.methods.allocation.decoder_blocks", lambda model: layers)
    monkeypatch.setattr("common.methods.allocation.iter_linears", lambda model: iter(layers))
    given = by_importance(None, costs.log().tolist(), 0.7, span)
    torch.testing.assert_close(torch.tensor(list(given.values())), expected)


def test_four_decimals_in_the_text_are_ones_that_were_computed(blocks):
    """Up to the exercises, whose answers show their own arithmetic."""
    prose = re.sub(r"```.*?```", "", TEXT.split("## 7. ")[0], flags=re.DOTALL)
    prose = re.sub(r"<!-- (?:results:|worked).*?<!-- /\w+ -->", "", prose, flags=re.DOTALL)
    known = set(re.findall(r"\d+\.\d{4}", "".join(printed for printed, _ in blocks[1])))
    known |= {"8.8262", "4.3125", "3.3125"}  # sums shown beside them, checked below
    assert set(NUMBER.findall(prose)) <= known
    scores = blocks[0]["sparsegpt_scores"][0]
    assert f"{(scores[0] + scores[1]) / 2:.4f}" == "8.8262"
    assert (4 + 20 / 64, 1 + 0.5 * 4 + 20 / 64) == (4.3125, 3.3125)


def test_answers_to_the_exercises(blocks):
    H, w = torch.tensor([[2.0, 1], [1, 2]]), torch.tensor([1.0, -1])
    inverse = torch.linalg.inv(H)
    assert (w[0] ** 2 / inverse[0, 0] / 2).item() == pytest.approx(0.75)
    assert (w - w[0] / inverse[0, 0] * inverse[0]).tolist() == pytest.approx([0, -0.5])
    names = blocks[0]
    first_two = names["W"][0, :2] @ torch.linalg.inv(names["H_inverse"][:2, :2]) @ names["W"][0, :2] / 2
    assert f"{first_two:.4f}" == "13.3038"
    costs, best = torch.tensor([4.0, 1], dtype=torch.float64), names["best_allocation"]
    for beta, sparsities in ((10, (0.6307, 0.7693)), (5, (0.5614, 0.8386))):
        assert best(costs.tolist(), beta, 0.7).tolist() == pytest.approx(sparsities, abs=1e-4)
    mistaken = (costs * (5 * best(costs.tolist(), 10, 0.7)).exp()).sum() / (5 * torch.tensor(3.5).exp())
    assert mistaken.item() == pytest.approx(0.849, abs=1e-3)
