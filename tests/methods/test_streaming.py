"""Streamed evaluation: block after block, and yet the model's own logits."""

import pytest
import torch
from families import build

from common.methods.blocks import decoder_blocks
from common.methods.streaming import Streamed, lent, offloaded


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere"])  # a soft cap, a logit scale
def test_the_logits_are_the_models_own(kind, windows):
    model = build(kind)
    with torch.no_grad():
        expected = model(input_ids=windows, use_cache=False).logits
    found = list(Streamed(model, "cpu").stream(windows))
    assert len(found) == len(windows)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_block_at_a_time_and_the_model_is_left_as_it_was(llama, windows, monkeypatch):
    """`cpu:0` is the CPU under another name: it shows what is moved where on a machine without a GPU."""
    moves, names = [], {block: index for index, block in enumerate(decoder_blocks(llama))}
    kind = type(decoder_blocks(llama)[0])
    monkeypatch.setattr(kind, "to", lambda self, device: moves.append((names[self], str(device))))
    with torch.no_grad():
        before = llama(input_ids=windows).logits
    stream = Streamed(llama, "cpu:0").stream(windows)
    next(stream)
    assert moves == [(0, "cpu:0"), (1, "cpu:0"), (2, "cpu:0")]  # nothing is copied back
    stream.close()  # half-way
    with torch.no_grad():
        assert torch.equal(llama(input_ids=windows).logits, before)
    assert len(decoder_blocks(llama)) == 3
    assert not [block for block in decoder_blocks(llama) if "forward" in vars(block)]


def test_what_is_lent_comes_back_as_the_very_same_memory(llama):
    block = decoder_blocks(llama)[0]
    before = {name: value.data_ptr() for name, value in llama.state_dict().items()}
    with pytest.raises(RuntimeError), lent(block, "cpu:0"):  # half-way, too
        assert not {parameter.data_ptr() for parameter in block.parameters()} & set(before.values())
        raise RuntimeError
    assert {name: value.data_ptr() for name, value in llama.state_dict().items()} == before


def test_an_offloaded_model_computes_what_it_did_and_is_left_as_it_was(llama, windows, monkeypatch):
    with torch.no_grad():
        expected = llama(input_ids=windows, output_hidden_states=True)
        moves, kind = [], type(decoder_blocks(llama)[0])
        monkeypatch.setattr(kind, "to", lambda self, device: moves.append(str(device)))
        with offloaded(llama, "cpu:0"):
            found = llama(input_ids=windows, output_hidden_states=True)
        assert moves == ["cpu:0"] * 3
        assert all(torch.equal(a, b) for a, b in zip(found.hidden_states, expected.hidden_states, strict=True))
        llama(input_ids=windows)
    assert len(moves) == 3, "no hook is left"
