"""Rotations: Hadamard matrices are orthogonal, the rotated model is the same function, outliers are spread."""

import copy

import pytest
import torch

from common.methods.outliers import TokenKurtosis, kurtosis
from common.methods.quantization import QuantizeConfig, gptq_model
from common.methods.rotation import hadamard, random_rotation, rotate_model


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 64, 128, 576, 1536, 4096])
def test_hadamard(n):
    matrix = hadamard(n)
    if n == 28:
        assert matrix is None  # 27 is no prime: Paley's other constructions are not built here
        return
    assert set(matrix.unique().tolist()) <= {-1.0, 1.0}
    if n <= 1536:
        assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [12, 28, 64])
def test_random_rotation_is_orthogonal(n):
    turn = random_rotation(n, torch.Generator().manual_seed(1))
    torch.testing.assert_close(turn @ turn.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not torch.equal(turn, random_rotation(n, torch.Generator().manual_seed(2)))


def unlike_norms(model):
    """Norms of a fresh model are all ones: give them weights, as training does."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("which", [{}, {"residual": False}, {"heads": False}, {"width": 16}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_function_stays(make_llama, which, tied):
    model = unlike_norms(make_llama(tie_word_embeddings=tied))
    ids = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    rotated = rotate_model(copy.deepcopy(model), **which)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert (rotated(input_ids=ids).logits - expected).norm() < 1e-5 * expected.norm()  # float32: ε is 1.2e-7
    changed = (rotated.model.layers[1].self_attn.o_proj.weight - model.model.layers[1].self_attn.o_proj.weight).norm()
    assert changed > 0.5 * model.model.layers[1].self_attn.o_proj.weight.norm()


def test_a_rotated_model_is_saved_and_loaded_as_itself(make_llama, tmp_path):
    from transformers import AutoModelForCausalLM

    model = rotate_model(unlike_norms(make_llama()))
    model.save_pretrained(tmp_path)
    ids = torch.arange(30)[None]
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits
        torch.testing.assert_close(again, model(input_ids=ids).logits)


def test_it_spreads_outliers():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(200, 576, generator=generator)
    tokens[:, 7] *= 50
    turned = tokens.double() @ random_rotation(576, generator)
    assert kurtosis(tokens).mean() > 50
    assert kurtosis(turned).mean() < 4
    gathered = TokenKurtosis(576, tokens)
    for part in tokens.split(70):
        gathered.add(part)
    assert gathered.mean == pytest.approx(kurtosis(tokens).mean().item(), rel=1e-4)
    assert kurtosis(torch.eye(5)[0]).item() == pytest.approx(5)


def test_other_families_are_refused_before_the_first_change(make_llama):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Gemma2ForCausalLM(Gemma2Config(vocab_size=256, num_key_value_heads=2, head_dim=16, **sizes)).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Gemma2ForCausalLM cannot be rotated here"):
        rotate_model(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_rotated_model_can_be_quantized(llama):
    text = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(3))
    gptq_model(rotate_model(llama), text, QuantizeConfig(group_size=16))
