"""GPTQ that is interrupted between two blocks, and taken up again: the same file, and no block computed twice."""

import copy

import pytest
import torch

from common.formats.gptq import save_gptq
from common.methods import quantization
from common.methods.quantization import QuantizeConfig, gptq_model

CONFIG = QuantizeConfig(bits=4, group_size=32)


class Interrupted(Exception):
    """As a kernel that is stopped."""


@pytest.fixture
def gptq_calls(monkeypatch):
    """How often the column loop has run; `stop_at`: the call that is interrupted."""
    calls = type("Calls", (), {"made": 0, "stop_at": -1})()
    usual = quantization.gptq

    def counted(*arguments, **options):
        if calls.made == calls.stop_at:
            raise Interrupted
        calls.made += 1
        return usual(*arguments, **options)

    monkeypatch.setattr(quantization.gptq_model, "__kwdefaults__", gptq_model.__kwdefaults__ | {"quantize": counted})
    return calls


@pytest.mark.parametrize("batch_size", [None, 2])
def test_the_same_file(make_llama, windows, tokenizer, tmp_path, gptq_calls, batch_size, capsys):
    def compress(name, **options):
        model = make_llama(vocab_size=max(256, len(tokenizer)))
        quantized = gptq_model(model, windows, CONFIG, batch_size=batch_size, **options)
        return save_gptq(tmp_path / name, model, tokenizer, quantized, method="gptq", parent="original")

    whole = compress("whole")
    per_block = gptq_calls.made // 3
    gptq_calls.made, gptq_calls.stop_at = 0, 2 * per_block + 1  # inside the third block
    unfinished = {"resume": tmp_path / "unfinished"}
    with pytest.raises(Interrupted):
        compress("never", **unfinished)
    assert len(list((tmp_path / "unfinished").glob("block-*.safetensors"))) == 2
    gptq_calls.made, gptq_calls.stop_at = 0, -1
    resumed = compress("resumed", **unfinished)
    assert gptq_calls.made == per_block, "two of three blocks were done"
    assert "Resumed at block 2: an interrupted run had finished the 2 before it." in capsys.readouterr().out
    assert resumed.sha256 == whole.sha256
    assert not (tmp_path / "unfinished").exists() and not (tmp_path / "never").exists()


def test_blocks_of_another_run_are_not_taken(llama, windows, tmp_path, gptq_calls):
    gptq_calls.stop_at = 5
    with pytest.raises(Interrupted):
        gptq_model(copy.deepcopy(llama), windows, CONFIG, resume=tmp_path / "r")
    gptq_calls.stop_at = -1
    other = copy.deepcopy(llama)
    other.model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    for model, text, config in (
        (other, windows, CONFIG),
        (llama, windows.flip(0), CONFIG),
        (llama, windows, QuantizeConfig(bits=3, group_size=32)),
    ):
        expected, found = copy.deepcopy(model), copy.deepcopy(model)
        gptq_calls.made = 0
        gptq_model(expected, text, config)
        needed, gptq_calls.made = gptq_calls.made, 0
        gptq_model(found, text, config, resume=tmp_path / "r")
        assert gptq_calls.made == needed
        pairs = zip(expected.state_dict().values(), found.state_dict().values(), strict=True)
        assert all(torch.equal(one, same) for one, same in pairs)
