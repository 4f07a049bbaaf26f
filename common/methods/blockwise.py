"""Block-wise training of quantized weights: the first half of EfficientQAT (Chen et al., 2024, arXiv:2407.11062).

GPTQ makes up for the error of one matrix at a time, in closed form; here all matrices of a decoder block are trained
together, by gradient descent on what they round to, so that the block, given what it will really receive, puts out what
the original block does. One block is in memory at a time, so this reaches models that training end to end does not.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.methods.beside import Beside
from common.methods.blocks import walk
from common.methods.capture import Block, BlockInputs
from common.methods.gptaq import ALPHA, AsymmetricHessian, asymmetric_gptq
from common.methods.qad import put_on_grid, settle_on_grid
from common.methods.quantization import QuantizeConfig, QuantizedWeight, check_widths
from common.methods.requirements import require_needs
from common.methods.stages import Stage


@torch.enable_grad()
def train_block(
    block: Block,
    quantized: dict[str, QuantizedWeight],
    batches: list[BlockInputs],
    targets: list[Tensor],
    *,
    steps: int,
    learning_rate: float,
    device: torch.device,
) -> dict[str, QuantizedWeight]:
    """Train a block's shadow weights and scales until its output is nearer to `targets`, one per batch; in place.

    quantized: its matrices by name in the block. A step is a batch, in turn; Adam, the rate falling to 0 as a cosine.
    Returns the new codes and scales, which the block computes with from then on.
    """
    computing = next(iter(block.linears.values())).weight.dtype
    block.module.requires_grad_(False)
    trained = []
    for name, weight in quantized.items():
        trained += put_on_grid(block.linears[name], weight.to(device))

    optimizer = torch.optim.Adam(trained, lr=learning_rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        batch, target = batches[step % len(batches)], targets[step % len(batches)].to(device).float()
        with torch.autocast(device.type, computing, enabled=computing != torch.float32, cache_enabled=False):
            output = block(batch, device).to(device)
        loss = F.mse_loss(output.float(), target) / target.var()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    found = {name: settle_on_grid(block.linears[name]) for name in quantized}
    for name in found:
        block.linears[name].weight.data = block.linears[name].weight.data.to(computing)
    return found


def blockwise_model(
    model: nn.Module,
    windows: Tensor,
    config: QuantizeConfig,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int,
    alpha: float = ALPHA,
    **walk_options,
) -> dict[str, QuantizedWeight]:
    """GPTAQ, then training, for one decoder block after the other, in place; returns the quantized weights by name.

    windows: calibration tokens [nsamples, seqlen]; batch_size of them make a step. alpha: as in `gptaq_model`.
    """
    require_needs(model, "training on the grid")
    check_widths(model, config)
    home, quantized = model.device, {}

    def change(stage: Stage, statistic: AsymmetricHessian) -> None:
        quantized.update(asymmetric_gptq(stage, statistic, config, alpha))

    def refine(block: Block, batches: list[BlockInputs], beside: Beside) -> None:
        device = next(block.module.parameters()).device
        targets = [beside.block(batch, device) for batch in beside.batches]
        mine = {name: quantized[f"{block.path}.{name}"] for name in block.linears}
        options = {"steps": steps, "learning_rate": learning_rate, "device": device}
        for name, weight in train_block(block, mine, batches, targets, **options).items():
            quantized[f"{block.path}.{name}"] = weight.to(home)

    options = {"beside": True, "refine": refine, "batch_size": batch_size} | walk_options
    walk(model, windows, AsymmetricHessian, change, **{"description": config.label("block-wise")} | options)
    return quantized
