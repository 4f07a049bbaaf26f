"""GPTAQ: GPTQ whose target is what the original network computes (Li et al., 2025, arXiv:2504.02692).

GPTQ lets a layer imitate itself on the inputs that it will receive, X̂, which the layers quantized before it have
moved. GPTAQ lets it imitate the original network, which receives X: ‖WX - ŴX̂‖². Whatever the weights do, the output
lacks W·ΔX, ΔX = X - X̂; the columns still to be quantized make up for that too, as far as X̂ can express it:

    w_j += α · w_i · P_ij for j > i,    P = triu(ΔX X̂ᵀ Uᵀ, 1) · U,    U as in GPTQ, H⁻¹ = UᵀU

α = 1 is what the derivation says, 0 is GPTQ; the authors' code takes 0.25. Their code adds the part of later blocks of
columns with w_i already rounded; here each w_i counts as it stands when its turn comes, so that the block size changes
the speed only.
"""

from functools import partial

import torch
from torch import Tensor, nn

from common.methods.blocks import walk
from common.methods.compensation import Hessian
from common.methods.quantization import QuantizeConfig, QuantizedWeight, check_widths, gptq, gptq_linears
from common.methods.stages import Stage

ALPHA = 0.25


class AsymmetricHessian(Hessian):
    """A Hessian of the inputs X̂, and the cross term 2·ΔXᵀX̂ / n with the original network's inputs X."""

    def __init__(self, in_features: int, like: Tensor):
        super().__init__(in_features, like)
        self.cross = torch.zeros_like(self.upper)
        self.moved = torch.zeros((), device=like.device)

    def add(self, inputs: Tensor, original: Tensor) -> None:
        """Both [tokens, in_features], of the same tokens."""
        super().add(inputs)
        for mine, theirs in zip(inputs.split(4096), original.split(4096), strict=True):
            moved, mine = theirs.float() - mine.float(), mine.float()
            self.cross.addmm_(moved.T, mine)
            self.moved += moved.square().sum()

    @property
    def asymmetry(self) -> Tensor:
        """2·ΔXᵀX̂ / n [in_features, in_features]."""
        return self.cross * (2 / self.tokens)

    @property
    def drift(self) -> float:
        """‖ΔX‖ / ‖X̂‖: how far the layers before have moved this one's inputs."""
        return (self.moved / self.upper.diagonal().sum()).sqrt().item()


def asymmetric_gptq(
    stage: Stage, statistic: AsymmetricHessian, config: QuantizeConfig, alpha: float
) -> dict[str, QuantizedWeight]:
    """GPTAQ for the layers of a stage, in place; returns their quantized weights by full name."""
    quantize = partial(gptq, asymmetry=alpha * statistic.asymmetry)
    return gptq_linears(stage.named, statistic, config, keep_zeros=False, quantize=quantize)


def gptaq_model(
    model: nn.Module, windows: Tensor, config: QuantizeConfig, alpha: float = ALPHA, **walk_options
) -> dict[str, QuantizedWeight]:
    """GPTAQ for every linear layer of the decoder blocks, in place; as `quantization.gptq_model`.

    windows: calibration tokens [nsamples, seqlen]. alpha: the share of the correction; 0 gives GPTQ's codes.
    Raises ValueError for a mixture of experts. `walk_options` go to `common.methods.blocks.walk`.
    """
    check_widths(model, config)
    home = model.device
    quantized = {}

    def change(stage: Stage, statistic: AsymmetricHessian) -> None:
        results = asymmetric_gptq(stage, statistic, config, alpha)
        quantized.update({name: result.to(home) for name, result in results.items()})

    options = {"beside": True, "description": config.label("gptaq")} | walk_options
    walk(model, windows, AsymmetricHessian, change, **options)
    return quantized
