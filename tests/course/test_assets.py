"""Model specs and what a student reads when one does not work."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from common.course import assets


@pytest.fixture
def saved(tmp_path, llama, tokenizer):
    llama.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_local_folder_loads_model_and_tokenizer(saved, llama):
    model = assets.load_model(str(saved), torch.float32)
    for mine, theirs in zip(llama.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert assets.load_tokenizer(str(saved)).pad_token is not None


def test_folder_without_tokenizer_says_what_is_missing(tmp_path, llama):
    llama.save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer_config.json.*save_pretrained"):
        assets.load_model(str(tmp_path / "bare"), torch.float32)


def test_truncated_weights_are_one_clear_error(saved):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        assets.load_model(str(saved), torch.float32)


def test_hub_model_offline_names_the_embedded_one(monkeypatch):
    with pytest.raises(ConnectionError, match='MODEL = "embedded"'):
        assets.load_model("meta-llama/Llama-2-7b-hf", torch.float32)


def test_gated_model_says_how_to_log_in(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    def refuse(*_):
        error = GatedRepoError.__new__(GatedRepoError)
        Exception.__init__(error, "gated")
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(PermissionError, match="hf auth login"):
        assets.load_tokenizer("meta-llama/Llama-2-7b-hf")


def test_spec_that_is_nothing():
    with pytest.raises(FileNotFoundError, match="no folder and no Hub id"):
        assets.load_model("no-such-model", torch.float32)


def test_unknown_shape():
    with pytest.raises(ValueError, match=r"Unknown shape.*llama-2-7b"):
        assets.load_model("shape:llama-9", torch.float32)


def test_shape_has_the_published_parameter_count():
    with torch.device("meta"):
        model = assets.AutoModelForCausalLM.from_config(assets.model_config("shape:llama-2-7b"))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616  # Llama-2-7B


def test_random_shape_computes(monkeypatch, llama):
    monkeypatch.setitem(assets.SHAPES, "tiny", llama.config)
    model = assets.load_model("shape:tiny", torch.float32)
    logits = model(input_ids=torch.arange(8)[None]).logits
    assert logits.isfinite().all()
    norms = [p for p in model.parameters() if p.dim() == 1]
    assert all((p == 1).all() for p in norms)
    # The rotary frequencies are buffers: they must be those of an ordinary model, not uninitialized memory.
    assert torch.equal(model.model.rotary_emb.inv_freq, llama.model.rotary_emb.inv_freq)


def test_too_little_memory_says_how_much_is_needed():
    with pytest.raises(MemoryError, match=r"needs about 1048576\.0 GiB"):
        assets.require_memory(2**50, "Model 'huge'", torch.device("cpu"))


@pytest.mark.parametrize("spec", ["embedded", "embedded-as-shipped"])
def test_embedded_model_is_what_facts_say(spec):
    folder = Path(assets.locate(spec))
    assert (folder / "model.safetensors").stat().st_size == 269_060_552
    tensors = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 134_515_008
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
