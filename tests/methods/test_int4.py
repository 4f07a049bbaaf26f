"""The packed 4-bit layer: its words hold the codes, and the kernel computes with the matrix that they stand for."""

import importlib
import json

import pytest
import torch

from common.course.settings import CHAPTER, ROOT
from common.methods.int4 import Int4Linear, TorchInt4, pack_words, unpack_words, use_torch_int4
from common.methods.quantization import QuantizeConfig, rtn, rtn_model


def _layer(out: int, width: int, sym: bool = False):
    """A layer, and the matrix that its codes stand for."""
    weight = rtn(torch.randn(out, width), QuantizeConfig(4, 128, sym=sym, mse=False, desc_act=False))
    return Int4Linear(weight), weight.dequantize()


@pytest.fixture
def kernel(monkeypatch):
    """The kernel's module: compiled on a GPU, interpreted elsewhere."""
    pytest.importorskip("triton")
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return importlib.import_module("common.methods.int4_kernel")


@pytest.mark.parametrize("sym", [True, False])
def test_the_words_hold_the_codes(sym):
    layer, weight = _layer(32, 11 * 128, sym)
    assert layer.words.shape == (32, 11 * 16)
    torch.testing.assert_close(layer.dequantize(), weight, rtol=0, atol=0)
    x = torch.randn(2, 3, weight.shape[1])
    torch.testing.assert_close(layer(x), x @ weight.T)


def test_packing_and_unpacking_undo_each_other():
    codes = torch.randint(0, 16, (8, 384), dtype=torch.uint8)
    assert torch.equal(unpack_words(pack_words(codes)).to(torch.uint8), codes)


def test_bits_of_a_small_integer_are_a_bfloat16_in_its_proportion():
    """What saves the kernel the conversion: the first bfloat16 numbers are evenly spaced, up to eight bits."""
    codes = torch.arange(16, dtype=torch.int16)
    for place in range(2):
        tiny = (codes << 4 * place).view(torch.bfloat16).double()
        assert torch.equal(tiny * 2.0**133, codes.double() * 16**place)
        for zero in range(16):  # and what the kernel makes of it has no rounding error
            found = tiny.bfloat16() * 2.0 ** (127 - 4 * place) - zero * 2.0**-6
            assert torch.equal(found.double() * 64, codes.double() - zero)
    third = (codes << 8).view(torch.bfloat16).double() * 2.0**133
    assert not torch.equal(third, codes.double() * 16**2)


@pytest.mark.parametrize(("tokens", "groups"), [(1, 3), (5, 9), (17, 2), (33, 5)])
def test_the_kernel_computes_with_the_dequantized_weight(kernel, tokens, groups):
    """Twice: the second product finds the workspace as the first has left it."""
    layer, weight = _layer(128, groups * 128)
    cuda = torch.cuda.is_available()
    device, kind = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    layer = layer.to(device)
    for _ in range(2):
        x = torch.randn(tokens, weight.shape[1]).to(kind)
        found = kernel.product(x.to(device), layer.words, layer.scale, layer.zero).cpu()
        expected = x.double() @ weight.double().T
        assert (found.double() - expected).norm() < (2**-8 if cuda else 1e-6) * expected.norm()
    if cuda:
        torch.testing.assert_close(layer(x.to(device)).cpu(), found)


def test_the_kernel_refuses_what_it_is_not_made_for(kernel):
    layer, _ = _layer(128, 128)
    with pytest.raises(ValueError, match="up to 64 tokens"):
        kernel.product(torch.randn(65, 128), layer.words, layer.scale, layer.zero)
    narrow, _ = _layer(24, 128)
    with pytest.raises(ValueError, match=r"not 1 in torch\.float32 with 24"):
        kernel.product(torch.randn(1, 128), narrow.words, narrow.scale, narrow.zero)


@pytest.mark.parametrize("config", [QuantizeConfig(4, 128, sym=True, mse=False), QuantizeConfig(4, 32, mse=False)])
def test_torch_int4_computes_with_the_dequantized_weight(config):
    weight, x = torch.randn(96, 256), torch.randn(2, 3, 256)
    quantized = rtn(weight, config)
    torch.testing.assert_close(
        TorchInt4(quantized, torch.float32)(x), x @ quantized.dequantize().T, rtol=1e-4, atol=1e-3
    )


def test_other_groups_are_refused():
    weight = rtn(torch.randn(8, 128), QuantizeConfig(4, 64, mse=False))
    with pytest.raises(ValueError, match="4 bits in groups of 128, not QuantizeConfig"):
        Int4Linear(weight)


@torch.no_grad()
def test_a_model_with_packed_layers_computes_with_the_rounded_ones(make_llama):
    config = QuantizeConfig(4, 32, mse=False, desc_act=False)
    packed, rounded = (make_llama(hidden_size=64, intermediate_size=96, attention_bias=True) for _ in range(2))
    torch.nn.init.normal_(packed.model.layers[0].self_attn.q_proj.bias)
    rounded.load_state_dict(packed.state_dict())
    rtn_model(rounded, config)
    use_torch_int4(packed, config, torch.device("cpu"))
    ids = torch.randint(0, packed.config.vocab_size, (2, 7))
    assert not [name for name, module in packed.model.layers.named_modules() if isinstance(module, torch.nn.Linear)]
    torch.testing.assert_close(packed(ids).logits, rounded(ids).logits, rtol=1e-3, atol=1e-4)


def test_the_lines_that_notebook_03_explains_are_the_kernels():
    notebook = CHAPTER / "Lab-3.1-Quantization" / "03-Inference.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    [text] = [text for cell in cells if "tl.dot(low" in (text := "".join(cell["source"]))]
    shown = text.split("```python\n")[1].split("```")[0]
    assert shown in (ROOT / "common" / "methods" / "int4_kernel.py").read_text(encoding="utf-8")
    explained = [line for line in text.splitlines() if line.split(".")[0].isdigit()]
    assert len(explained) == len(set(shown.splitlines())) - 1, "a line for each (the two of `tl.dot` share one)"
