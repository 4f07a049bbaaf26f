"""A model that reads tokens into a static KV cache, at positions that live on the device: no step asks the host."""

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import StaticLayer

from common.methods.proofs import few_tokens, logits_of


class Reader:
    """`model` with room for `length` tokens of each of `batch` sequences.

    Every layer keeps all tokens, those with a sliding window, too: their masks say what they may see. To go back,
    read from an earlier position: what lies behind is never seen, and overwritten.
    """

    def __init__(self, model: nn.Module, batch: int, length: int):
        self.model, self.batch = model, batch
        blocks = model.config.get_text_config().num_hidden_layers
        self.cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(blocks)])

    def __call__(self, ids: Tensor, position: Tensor, keep: int = 0) -> Tensor:
        """Logits [batch, n, vocabulary] after ids [batch, n], whose first token stands at `position` (int64, on the
        device); the tokens before it have been read already. keep: of so many positions, the last ones; 0 of all."""
        for layer in self.cache.layers:
            layer.cumulative_length.copy_(position)
        positions = position + torch.arange(ids.shape[1], device=ids.device)
        given = {"position_ids": positions[None], "past_key_values": self.cache, "logits_to_keep": keep}
        return self.model(input_ids=ids, **given).logits


@torch.no_grad()
def require_static_cache(model: nn.Module) -> None:
    """Raise ValueError unless tokens read in pieces, one of them twice, give the logits of one pass over all."""
    ids, why = few_tokens(model, 8), ""
    try:
        reader = Reader(model, 1, 12)
        first, again, rest = (
            reader(ids[:, a:b], torch.tensor(a, device=ids.device)) for a, b in ((0, 5), (3, 5), (4, 8))
        )
        found = torch.cat((first[:, :3], again[:, :1], rest), 1).float()
        expected = logits_of(model, ids).float()
        limit = max(1e-4, 4 * torch.finfo(model.dtype).eps)  # other shapes of the products, other sums
        if not (found - expected).norm() <= limit * expected.norm():
            why = "its logits are others"
    except Exception as error:  # whatever a family does otherwise
        why = str(error)
    if why:
        raise ValueError(
            f"{type(model).__name__} cannot be read into a static KV cache piece by piece ({why}), which writing and "
            "speculative decoding need here."
        )
