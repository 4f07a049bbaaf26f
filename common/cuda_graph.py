"""Work captured once in a CUDA graph and replayed: a GPU does small steps faster than Python can ask for them."""

from collections.abc import Callable

import torch
from torch import Tensor


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
