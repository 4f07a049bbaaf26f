"""Does a CUDA graph hold all of a model's work? Timings of one that does not are too good to be true."""

import torch

from common.benchmarking import Decoder


@torch.inference_mode()
def check_recording(decoder: Decoder) -> None:
    """Raise RuntimeError when the recorded decoding step computes something else than the model itself.

    A kernel that is started on another stream than PyTorch's current one (ExLlamaV2's in GPTQModel 7.6.0 is) runs
    while the step is recorded, but is not recorded: replays silently leave it out, and look fast. On a CPU, where
    nothing is recorded, this checks nothing.
    """
    expected = decoder._step()
    if not (decoder() - expected).norm() <= 0.01 * expected.norm():  # NaN is no match either
        raise RuntimeError(
            "The recorded decoding step computes something else than the model: a kernel of its layers ignores the "
            "current CUDA stream, so the CUDA graph lacks it. Choose another kernel."
        )
