"""Model specs and what a student reads when one does not work."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["embedded", "embedded-as-shipped"])
def test_embedded_model_is_what_facts_say(spec):
    folder = Path(assets.locate(spec))
    assert (folder / "model.safetensors").stat().st_size == 269_060_552
    tensors = load_file(folder / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == 134_515_008
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def change(folder, drop="", add=None):
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if not drop or drop not in name}
    save_file(kept | (add or {}), folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_an_error_that_names_them(saved):
    """transformers would make them up."""
    change(saved, drop="layers.1.mlp")
    with pytest.raises(
        ValueError, match=r"lacks 3 tensors that LlamaForCausalLM needs: model\.layers\.1\.mlp\.down_proj"
    ):
        assets.load_model(str(saved), torch.float32)


def test_unexpected_tensors_are_told(saved):
    change(saved, add={"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)})
    with pytest.warns(UserWarning, match=r"holds 1 tensors that LlamaForCausalLM does not use: model\.layers\.7"):
        assets.load_model(str(saved), torch.float32)


def test_other_shapes_than_the_config_says(saved):
    file = saved / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 96}))
    with pytest.raises(ValueError, match=r"other shapes than its config\.json says"):
        assets.load_model(str(saved), torch.float32)


def test_a_missing_shard_is_named(tmp_path, llama, tokenizer):
    llama.save_pretrained(tmp_path / "m", max_shard_size="200KB")
    tokenizer.save_pretrained(tmp_path / "m")
    gone = sorted((tmp_path / "m").glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(ValueError, match=f"lacks {gone.name}"):
        assets.load_model(str(tmp_path / "m"), torch.float32)


def test_pickled_weights_are_not_loaded(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \.safetensors file of a whole model \(only pytorch_model\.bin\)"):
        assets.load_model(str(saved), torch.float32)


def test_a_separate_head_beside_a_tied_configuration_is_the_models(tmp_path, make_llama, tokenizer):
    model = make_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    loaded = assets.load_model(str(tmp_path / "m"), torch.float32)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert loaded.config.tie_word_embeddings is False


def test_a_hub_id_in_the_cache_is_a_folder(saved, tmp_path, monkeypatch):
    root = tmp_path / "hub" / "models--someone--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text("0" * 40)
    (root / "snapshots").mkdir()
    saved.rename(root / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert assets.local_folder("someone/tiny").samefile(root / "snapshots" / ("0" * 40))
    assert assets.local_folder(str(root / "snapshots" / ("0" * 40))).is_dir()
    with pytest.raises(ConnectionError, match="not in the local cache"):
        assets.local_folder("someone/else")
