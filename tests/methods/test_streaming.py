"""Streamed evaluation: block after block, and yet the model's own logits."""

import pytest
import torch
from families import build

from common.methods.blocks import decoder_blocks
from common.methods.streaming import Streamed


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
    assert moves == [(0, "cpu:0"), (0, "cpu"), (1, "cpu:0"), (1, "cpu"), (2, "cpu:0"), (2, "cpu")]
    stream.close()  # half-way
    with torch.no_grad():
        assert torch.equal(llama(input_ids=windows).logits, before)
    assert len(decoder_blocks(llama)) == 3
    assert not [block for block in decoder_blocks(llama) if "forward" in vars(block)]
