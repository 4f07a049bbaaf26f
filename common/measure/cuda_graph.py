"""Work captured once in a CUDA graph and replayed: a GPU does small steps faster than Python can ask for them."""

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from common.course.private import attention_of


def graphed(run: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """On a GPU, `run` captured once in a CUDA graph: calling the result replays its kernels without Python between.

    `run` must do the same work on the same tensors each time; it is run a few times before. On a CPU it is returned
    as it is.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels that compile or tune themselves do so before the capture
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


# Attention of whole windows: nothing to mask but the future, which the kernel does by itself. While a graph is
# captured, transformers would build a mask of [seqlen, seqlen] instead, and lose the fast kernel with it.
AttentionInterface.register("causal", sdpa_attention_forward)
AttentionMaskInterface.register("causal", lambda *_, **__: None)


@contextmanager
def using_attention(model: nn.Module, implementation: str):
    """The model with another implementation of attention, for as long as the context lasts."""
    usual = attention_of(model.config)
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


class Body(nn.Module):
    """A causal LM without its head, for windows without padding: ids [batch, seqlen] → hidden states."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.base = model.base_model if model.base_model is not model else model.model  # Llama 4 misnames its own

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(input_ids=ids, use_cache=False).last_hidden_state


def graphed_body(model: nn.Module, ids: Tensor) -> Callable[[Tensor], Tensor]:
    """`Body(model)`; on a GPU its forward and backward pass are each captured in a CUDA graph, for ids of this shape.

    The model must stay in the mode (train or eval) that it is in, and its weights may change in place only. Under
    autocast, turn the cache of converted weights off, or the graph would keep those of today.
    """
    body = Body(model).train(model.training)
    if ids.device.type != "cuda":
        return body
    with using_attention(model, "causal"):
        return torch.cuda.make_graphed_callables(body, (ids.clone(),))
