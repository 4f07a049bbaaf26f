"""The trainer's CUDA graphs: that they compute what the model computes."""

import copy

import pytest
import torch

from common.course.private import attention_of
from common.measure.cuda_graph import Body, graphed_body

IDS = torch.randint(256, (4, 24), generator=torch.Generator().manual_seed(1))


def gradients(body, model, ids):
    """Hidden states of `ids`, and the gradient of a sum of them by parameter."""
    model.zero_grad()
    hidden = body(ids)
    (hidden * torch.linspace(-1, 1, hidden.shape[-1], device=hidden.device)).sum().backward()
    return hidden.detach().clone(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_body_is_the_model_without_its_head(llama):
    with torch.no_grad():
        logits = llama.get_output_embeddings()(graphed_body(llama, IDS)(IDS))
        torch.testing.assert_close(logits, llama(input_ids=IDS).logits)


def test_causal_attention_without_a_mask_is_the_usual_one(llama):
    expected = gradients(Body(llama), llama, IDS)
    llama.set_attn_implementation("causal")
    torch.testing.assert_close(gradients(Body(llama), llama, IDS), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_computes_what_the_model_computes_also_after_an_update(llama, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    model, ids = llama.cuda().train(), IDS.cuda()
    twin = copy.deepcopy(model)
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32, cache_enabled=False):
        body = graphed_body(model, ids)
        for shift in range(3):
            hidden, slopes = gradients(body, model, ids.roll(shift, 0))
            expected, expected_slopes = gradients(Body(twin), twin, ids.roll(shift, 0))
            torch.testing.assert_close(hidden, expected)
            for name, slope in slopes.items():
                assert (slope - expected_slopes[name]).norm() <= 1e-3 * expected_slopes[name].norm()
            with torch.no_grad():  # as an optimizer does: in place
                for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                    p.add_(0.01 * p.sign())
                    q.add_(0.01 * q.sign())
    assert attention_of(model.config) == attention_of(twin.config)
