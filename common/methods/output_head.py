"""What turns a model's last hidden states into logits, which is more than a matrix in many families.

Granite divides the product by a number, Cohere multiplies it, Gemma 2 caps it with a tanh, Phi and GPT-J add a bias.
A loss that leaves this out trains another model than the one that will be used.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.measure.cuda_graph import Body
from common.methods.proofs import evaluating, few_tokens, logits_of, same_logits

CAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"  # Gemma, RecurrentGemma, xLSTM


@dataclass(frozen=True)
class OutputHead:
    """logits = cap · tanh(scale · (hidden · weightᵀ + bias) / cap), or without the tanh where there is no cap."""

    weight: Tensor  # [vocabulary, hidden]
    bias: Tensor | None = None
    scale: float = 1.0
    cap: float | None = None

    def after(self, product: Tensor) -> Tensor:
        """Logits from the matrix product (with its bias)."""
        scaled = product * self.scale if self.scale != 1 else product
        return self.cap * torch.tanh(scaled / self.cap) if self.cap else scaled

    def before(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient of the product, from that of the logits: tanh' = 1 - tanh². Changes `gradient` in place."""
        if self.cap:
            gradient = gradient.mul_(1 - (logits.to(gradient.dtype) / self.cap).square())
        return gradient.mul_(self.scale) if self.scale != 1 else gradient

    def to(self, dtype: torch.dtype) -> "OutputHead":
        bias = self.bias if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.after(F.linear(hidden, self.weight, self.bias))


def output_head(model: nn.Module) -> OutputHead:
    """The head that the model's configuration describes; `require_output_head` proves that it is the model's own."""
    layer, config = model.get_output_embeddings(), model.config.get_text_config()
    caps = (getattr(config, name, None) for name in CAPS)
    return OutputHead(layer.weight, layer.bias, _scale(config), next(filter(None, caps), None))


def _scale(config) -> float:
    """The factor between product and logits; families name it differently, and some divide."""
    if getattr(config, "logits_scaling", None):  # Granite divides by it, HyperCLOVA X multiplies
        return config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    if getattr(config, "dim_model_base", None):  # MiniCPM: the hidden states are divided, μP's way
        return config.dim_model_base / config.hidden_size
    scales = getattr(config, "logit_scale", None), getattr(config, "lm_head_multiplier", None)  # Cohere, Falcon-H1
    return next(filter(None, scales), 1.0)


def require_output_head(model: nn.Module) -> None:
    """Raise ValueError unless `output_head` gives the model's own logits, on a few tokens."""
    refused = ValueError(
        f"{type(model).__name__} computes its logits from its last hidden states in a way that this course does not "
        "reproduce, so its loss would be another model's. Choose another family, such as Llama, Qwen or Gemma."
    )
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise refused
    ids = few_tokens(model)
    try:
        with evaluating(model):
            found = output_head(model)(Body(model)(ids))
    except Exception as error:  # whatever a family does otherwise
        raise refused from error
    if not same_logits(found, logits_of(model, ids)):
        raise refused
