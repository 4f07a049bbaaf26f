"""Private names of libraries: all in `common.course.private`, each doing what is relied on."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

from common.course.private import (
    add_to_catalogue,
    attention_of,
    compress_2_4,
    fastest_2_4,
    int4_product,
    product_2_4,
    set_attention,
)
from common.course.settings import CHAPTER, ROOT

OURS = ("common", "tools", "benchmarks", "tests")
HOME = ROOT / "common" / "course" / "private.py"
DOCUMENTED = {"os._exit"}  # a public function for all its underscore


def is_private(name: str) -> bool:
    return name.startswith("_") and name != "_" and not name.startswith("__")


def privates(source: str) -> Iterator[str]:
    """What code uses of others' private names: attributes, imports, and attributes asked for by name."""
    tree = ast.parse(source)
    own = {"self", "cls"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for name in node.names:
                dotted = f"{module}.{name.name}".strip(".")
                if dotted.split(".")[0] in OURS:
                    own.add(name.asname or name.name)
                elif any(map(is_private, dotted.split("."))):
                    yield dotted
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            text = ast.unparse(node)
            if not (isinstance(node.value, ast.Name) and node.value.id in own) and text not in DOCUMENTED:
                yield text
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            asked = node.args[1]
            if isinstance(asked, ast.Constant) and is_private(asked.value):
                yield ast.unparse(node)


def course() -> Iterator[tuple[Path, str]]:
    for folder in (*(ROOT / package for package in OURS[:3]), CHAPTER):
        for file in sorted(folder.rglob("*.py")):
            yield file, file.read_text(encoding="utf-8")
    for file in sorted(CHAPTER.rglob("*.ipynb")):
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                yield file, "".join(line for line in cell["source"] if not line.startswith(("%", "!")))


def test_private_names_stand_in_one_module():
    assert not [f"{file.name}: {name}" for file, code in course() if file != HOME for name in privates(code)]
    assert set(privates(HOME.read_text(encoding="utf-8"))) == {
        "get_translator('sphinx')._catalog",
        "config._attn_implementation",
        "torch._convert_weight_to_int4pack",
        "torch._cslt_compress",
        "torch._cslt_sparse_mm",
        "torch._cslt_sparse_mm_search",
        "torch._convert_weight_to_int4pack_for_cpu",
        "torch._weight_int4pack_mm",
        "torch._weight_int4pack_mm_for_cpu",
    }, "a new one needs a test below"


@pytest.mark.parametrize(
    "code",
    [
        "from torch._dynamo import config",
        "import torch._inductor",
        "import torch\ntorch._foreach_norm([])",
        "model.config._name_or_path",
        "getattr(model, '_tied', None)",
        "class A(B):\n    def f(self):\n        super()._f()",
    ],
)
def test_a_private_name_is_found(code):
    assert list(privates(code))


@pytest.mark.parametrize("code", ["self._x", "from common.measure import evaluation\nevaluation._logits", "a.__dict__"])
def test_ones_own_are_not(code):
    assert not list(privates(code))


# --- what is relied on -----------------------------------------------------------------------------------------------


@pytest.fixture
def config():
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16}
    return LlamaConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)


def test_a_model_says_how_it_computes_attention(config):
    model = LlamaForCausalLM(config)
    assert attention_of(model.config) == "sdpa"
    model.set_attn_implementation("eager")
    assert attention_of(model.config) == "eager"


def test_a_configuration_decides_how_its_model_computes_attention(config):
    """Also by a function that is registered here, which `attn_implementation=` of a configuration would not take."""
    called = []

    def ours(module, query, key, value, *_, **__):
        called.append(module)
        return value.transpose(1, 2), None

    AttentionInterface.register("ours", ours)
    set_attention(config, "ours")
    with torch.no_grad():
        LlamaForCausalLM(config)(input_ids=torch.tensor([[1, 2]]))
    assert len(called) == 1


def test_sphinx_says_what_it_was_given():
    locale = pytest.importorskip("sphinx.locale", reason="of the book's packages: requirements-book.txt")
    locale.init([str(Path(locale.__file__).parent)], "zh_TW")
    assert locale.get_translator("sphinx").gettext("Not a word of Sphinx") == "Not a word of Sphinx"
    add_to_catalogue({"Not a word of Sphinx": "不是 Sphinx 的話"})
    assert locale.get_translator("sphinx").gettext("Not a word of Sphinx") == "不是 Sphinx 的話"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_product_of_packed_codes_is_that_of_the_matrix(device):
    """Not symmetric, two groups, in bfloat16, whose products round to 8 bits."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (32, 64), generator=generator, dtype=torch.uint8)
    scale = torch.rand(2, 32, generator=generator) + 0.5
    offset = torch.randn(2, 32, generator=generator)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    groups = torch.arange(64) // 32
    matrix = (codes.float() - 8) * scale.bfloat16().float()[groups].T + offset.bfloat16().float()[groups].T
    packed, product = int4_product(codes.to(device))
    found = product(x.to(device), packed, 32, torch.stack([scale, offset], dim=-1).bfloat16().to(device))
    expected = x.float() @ matrix.T
    assert (found.cpu().float() - expected).abs().max() < 2**-7 * (x.float().abs() @ matrix.abs().T).max()


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [16, 264])
def test_the_product_of_a_compressed_2_4_weight_is_that_of_the_matrix(tokens):
    """In both layouts, and with the algorithm that the search finds."""
    generator = torch.Generator("cuda").manual_seed(0)
    weight, x = (torch.randn(n, 256, device="cuda", generator=generator).bfloat16() for n in (128, tokens))
    weight[:, 1::4], weight[:, 2::4] = 0, 0
    packed = compress_2_4(weight)
    assert packed.nbytes == weight.nbytes * 9 // 16
    expected, most = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    for transpose in (False, True):
        for algorithm in (0, fastest_2_4(packed, x.T, transpose)):
            found = product_2_4(packed, x.T, algorithm, transpose)
            assert found.is_contiguous()
            assert ((found if transpose else found.T) - expected).abs().max() <= 2**-8 * most.max()
