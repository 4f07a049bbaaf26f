"""Whatever decoder a student brings: every step is right on it, or refuses by name before it changes anything.

`results/families.json` holds what each step does with each family; the table in the chapter's README shows it.
COURSE_RECORD_FAMILIES=1 writes it anew.
"""

import copy
import json
import os
import warnings
from pathlib import Path

import pytest
import torch
from families import build
from test_families_distillation import REFUSED, RIGHT, minilm, narrower, shallower, the_loss, verdict
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from common.methods.awq import awq_model
from common.methods.blocks import collect, decoder_blocks, iter_linears
from common.methods.compensation import Hessian, squared_error
from common.methods.importance import keep_highest
from common.methods.pruning import PruneConfig, prune_model
from common.methods.quantization import QuantizeConfig, gptq_model, rtn, rtn_model
from common.methods.smoothquant import smooth_model, smoothquant_model
from common.methods.streaming import Streamed

TABLE = Path(__file__).parents[2] / "results" / "families.json"
DOZEN = ["gpt2", "opt", "xglm", "phi3", "gemma2", "cohere", "stablelm", "bamba"]
DOZEN += ["mixtral", "gpt_oss", "llama4_text", "dbrx", "deepseek_v3", "olmo2"]
CONFIG = QuantizeConfig(bits=3, group_size=-1, mse=False, desc_act=False)


@pytest.fixture
def windows():
    return torch.randint(3, 256, (6, 64), generator=torch.Generator().manual_seed(1))


def logits(model, windows):
    with torch.no_grad():
        return model(input_ids=windows, use_cache=False).logits


def fused(model) -> dict[str, torch.nn.Parameter]:
    """The parameters that hold the experts' matrices, found without the code under test."""
    kinds = ("Experts", "ExpertGLU", "ExpertsGemm")
    owners = [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith(kinds)]
    return {
        f"{n}.{k}": p
        for n, m in owners
        for k, p in m.named_parameters(recurse=False)
        if p.dim() >= 2 and "bias" not in k
    }


def weights(model) -> dict[str, torch.nn.Parameter]:
    """Every parameter that a step must change: linear layers, Conv1D, experts; not routers."""
    blocks = decoder_blocks(model)
    linear = {n: m for n, m in blocks.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    return {n: m.weight for n, m in linear.items() if "Router" not in type(m).__name__} | fused(blocks)


def errors(model, original, hessians, blocks=(0, 1)) -> float:
    """Σ ‖ΔW·X‖² over all matrices of the first blocks, on what they received originally."""
    before = dict(iter_linears(original))
    total = 0.0
    for name, linear in iter_linears(model):
        if any(f".{index}." in name for index in blocks):
            total += squared_error((linear.weight - before[name].weight).detach(), hessians[name].matrix).item()
    return total


def assert_every_matrix_changed(model, original) -> None:
    for (name, new), old in zip(weights(model).items(), weights(original).values(), strict=True):
        pieces = zip(new, old, strict=True) if new.dim() == 3 else [(new, old)]
        assert all(not torch.equal(n, o) for n, o in pieces), f"{name} was left as it was"


def assert_sparse(model, share) -> None:
    for name, weight in weights(model).items():
        assert (weight == 0).float().mean().item() == pytest.approx(share, abs=0.02), name


def rtn_is_right(model, original, windows, _):
    for name, quantized in rtn_model(model, CONFIG).items():
        expected = rtn(dict(iter_linears(original))[name].weight.detach(), CONFIG)
        assert torch.equal(quantized.codes, expected.codes)
        torch.testing.assert_close(dict(iter_linears(model))[name].weight, expected.dequantize())
    assert_every_matrix_changed(model, original)


def gptq_is_right(model, original, windows, hessians):
    quantized = gptq_model(model, windows, CONFIG, batch_size=2)
    assert set(quantized) == {name for name, _ in iter_linears(original)}
    assert_every_matrix_changed(model, original)
    rounded = copy.deepcopy(original)
    rtn_model(rounded, CONFIG)
    assert errors(model, original, hessians) < errors(rounded, original, hessians)


def awq_is_right(model, original, windows, hessians):
    awq_model(model, windows, CONFIG, batch_size=2)
    assert_every_matrix_changed(model, original)
    rounded = copy.deepcopy(original)
    rtn_model(rounded, CONFIG)
    # Where little can be folded (EXAONE 4, OLMo 2), one of the two blocks may gain nothing on its original inputs.
    pairs = [[errors(m, original, hessians, blocks) for m in (model, rounded)] for blocks in ((0,), (0, 1))]
    assert any(awq < rtn for awq, rtn in pairs)


def magnitude_is_right(model, original, windows, _):
    prune_model(model, None, PruneConfig("magnitude"))
    assert_sparse(model, 0.5)
    for name, linear in iter_linears(model):
        before = dict(iter_linears(original))[name].weight.abs()
        assert before[linear.weight != 0].min() >= before[linear.weight == 0].max(), name


def wanda_is_right(model, original, windows, _):
    masks = prune_model(model, windows, PruneConfig("wanda"), batch_size=2)
    assert_sparse(model, 0.5)
    inputs = first_block_inputs(original, windows)
    assert inputs, "nothing to compare with"
    for name, x in inputs.items():  # Wanda sees the first block as it was
        scores = dict(iter_linears(original))[name].weight.abs() * x.norm(dim=0)
        agree = (masks[name] == keep_highest(scores.detach(), 0.5)).float().mean()
        assert agree > 0.999, f"{name}: another mask than its inputs call for"  # but for ties after rounding


@torch.no_grad()
def first_block_inputs(model, windows) -> dict[str, torch.Tensor]:
    """What matrices of the first block receive: from hooks on its layers, and what its experts were called with."""
    seen, handles = {}, []
    block = decoder_blocks(model)[0]
    path = next(n for n, m in model.named_modules() if m is block)

    def of_linear(name):
        def hook(_, args):  # some are called twice in a block
            rows, key = args[0].flatten(end_dim=-2), f"{path}.{name}"
            seen[key] = torch.cat([seen[key], rows]) if key in seen else rows

        return hook

    def of_experts(name):
        def hook(module, args):
            if len(args) < 2 or not isinstance(args[1], torch.Tensor):
                return  # JetMoE: called with sorted tokens
            hidden, chosen = args[0].flatten(end_dim=-2), args[1]
            for e in range(4):
                x = hidden[(chosen == e).any(-1)]
                if not hasattr(module, "gate_up_proj"):  # DBRX
                    seen[f"{path}.{name}.mlp.{e}.w1"] = seen[f"{path}.{name}.mlp.{e}.v1"] = x
                    continue
                weight, bias = module.gate_up_proj[e], getattr(module, "gate_up_proj_bias", [None] * 4)[e]
                seen[f"{path}.{name}.{e}.gate_up_proj"] = x
                gate_up = F.linear(x, weight.T if module.is_transposed else weight, bias)
                seen[f"{path}.{name}.{e}.down_proj"] = module._apply_gate(gate_up)

        return hook

    for name, module in block.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and "Router" not in type(module).__name__:
            handles.append(module.register_forward_pre_hook(of_linear(name)))
        elif hasattr(module, "gate_up_proj") or type(module).__name__ == "DbrxExperts":
            handles.append(module.register_forward_pre_hook(of_experts(name)))
    logits(model, windows)
    for handle in handles:
        handle.remove()
    return seen


def sparsegpt_is_right(model, original, windows, hessians):
    prune_model(model, windows, PruneConfig("sparsegpt"), batch_size=2)
    assert_sparse(model, 0.5)
    cut = copy.deepcopy(original)
    prune_model(cut, None, PruneConfig("magnitude"))
    assert errors(model, original, hessians) < errors(cut, original, hessians)


def smoothing_is_right(model, original, windows, _):
    names = smooth_model(model, windows)
    assert names and set(names) <= {name for name, _ in iter_linears(original)}
    before = logits(original, windows)
    assert (logits(model, windows) - before).norm() < 1e-4 * before.norm()
    for name in names:
        assert not torch.equal(dict(iter_linears(model))[name].weight, dict(iter_linears(original))[name].weight)


def smoothquant_is_right(model, original, windows, _):
    smoothquant_model(model, windows)
    for name, weight in weights(model).items():
        codes = weight / (weight.abs().amax(-1, keepdim=True) / 127)
        torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0, msg=name)


def streaming_is_right(model, original, windows, _):
    for streamed, expected in zip(
        Streamed(model, "cpu").stream(windows[:2]), logits(original, windows[:2]), strict=True
    ):
        torch.testing.assert_close(streamed, expected, rtol=1e-4, atol=1e-4)


STEPS = {
    "RTN": rtn_is_right,
    "GPTQ": gptq_is_right,
    "AWQ": awq_is_right,
    "magnitude": magnitude_is_right,
    "Wanda": wanda_is_right,
    "SparseGPT": sparsegpt_is_right,
    "smoothing": smoothing_is_right,
    "SmoothQuant": smoothquant_is_right,
    "streaming": streaming_is_right,
}


DISTILLATION = {
    "distillation loss": lambda model, teacher, _, folder: the_loss(copy.deepcopy(model), teacher, folder),
    "MiniLM": lambda model, *_: minilm(copy.deepcopy(model)),
    "fewer blocks": lambda model, _, tokenizer, folder: shallower(model, tokenizer, folder),
    "narrower FFN": lambda model, _, __, folder: narrower(model, folder),
}


def taught(kind: str, tokenizer, folder) -> dict[str, str]:
    """Step of distillation → `right`, or `refused`, by a sentence that names the model."""
    model, teacher = build(kind), build(kind)
    generator, found = torch.Generator().manual_seed(5), {}
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.mul_(1 + 0.1 * torch.randn(parameter.shape, generator=generator))
    for step, is_right in DISTILLATION.items():
        found[step] = verdict(model, lambda is_right=is_right: is_right(model, teacher, tokenizer, folder))
        assert found[step] in (RIGHT, REFUSED), f"{step}: {found[step]}"
    return found


def outcomes(kind: str, windows) -> dict[str, str]:
    """Step → `right`, or the sentence by which it refused. Raises AssertionError where a step is silently wrong."""
    original = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            hessians = collect(original, windows, Hessian)
        except ValueError:
            hessians = None  # the steps will refuse likewise
        found = {}
        for step, is_right in STEPS.items():
            model = copy.deepcopy(original)
            try:
                is_right(model, original, windows, hessians)
                found[step] = "right"
            except ValueError as error:
                for (name, now), before in zip(model.named_parameters(), original.parameters(), strict=True):
                    assert torch.equal(now, before), f"{step} refused {kind} after it had changed {name}"
                found[step] = str(error)
    return found


def table() -> dict[str, dict[str, str]]:
    return json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {}


def hold(kind, windows, tokenizer, folder) -> None:
    """Compare with the table, or write its row."""
    found = outcomes(kind, windows) | taught(kind, tokenizer, folder)
    if os.environ.get("COURSE_RECORD_FAMILIES"):
        rows = dict(sorted((table() | {kind: found}).items()))
        TABLE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == table()[kind]


@pytest.mark.parametrize("kind", DOZEN)
def test_a_dozen_families(kind, windows, tokenizer, tmp_path):
    hold(kind, windows, tokenizer, tmp_path)


@pytest.mark.nightly
@pytest.mark.parametrize("kind", sorted(set(table()) - set(DOZEN)))
def test_every_family(kind, windows, tokenizer, tmp_path):
    hold(kind, windows, tokenizer, tmp_path)
