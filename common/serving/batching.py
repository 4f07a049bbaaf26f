"""Continuous batching: sequences of different lengths decode together, and join and leave between two tokens.

Reading the weights dominates a decoding step, and one reading serves every sequence of the batch. A batch that waited
for its longest member would waste that; here a finished sequence makes room at once (Orca, Yu et al., OSDI 2022).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

COLDEST = 1e-3  # below this temperature the most likely token is certain, and dividing by it overflows


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: temperature 0 takes the most likely one, otherwise they are drawn (nucleus sampling)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(eq=False)
class Sequence:
    """One request while it is computed."""

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = Sampling()
    tokens: list[int] = field(default_factory=list)  # chosen so far
    generator: torch.Generator | None = None

    def __post_init__(self):
        if self.sampling.temperature >= COLDEST:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """The next token for `logits` [vocabulary]; each sequence draws from its own generator."""
        if self.generator is None:
            return logits.argmax().item()
        probabilities, ids = (logits.float().cpu() / self.sampling.temperature).softmax(-1).sort(descending=True)
        before = probabilities.cumsum(-1) - probabilities  # of all more likely tokens
        probabilities[1:][before[1:] >= self.sampling.top_p] = 0
        return ids[torch.multinomial(probabilities, 1, generator=self.generator)].item()


class RowCache:
    """Keys and values with one row per sequence, every row filled from its own beginning.

    `update` is the interface that transformers' attention layers call; tensors are [rows, heads, context, head size].
    """

    def __init__(self, rows: int, context: int):
        self.rows, self.context = rows, context
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.lengths: list[int] = []  # of the sequences in rows 0, 1, ...

    def append(self, prompt: DynamicCache) -> None:
        """Copy the cache of a prompt [1, heads, length, head size] into the next free row."""
        row, length = len(self.lengths), prompt.get_seq_length()
        for index, layer in enumerate(prompt.layers):
            for store, new in ((self.keys, layer.keys), (self.values, layer.values)):
                if index == len(store):
                    store.append(new.new_zeros(self.rows, new.shape[1], self.context, new.shape[3]))
                store[index][row, :, :length] = new[0]
        self.lengths.append(length)

    def remove(self, row: int) -> None:
        """Drop a sequence; the last one moves into its row, so that rows in use stay together."""
        last = len(self.lengths) - 1
        for tensor in (*self.keys, *self.values):
            tensor[row, :, : self.lengths[last]] = tensor[last, :, : self.lengths[last]]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def update(self, keys: Tensor, values: Tensor, layer: int, *_) -> tuple[Tensor, Tensor]:
        """Store one new token per row ([rows in use, heads, 1, head size]); what attention looks at, padded."""
        rows, longest = range(len(keys)), max(self.lengths) + 1
        for store, new in ((self.keys, keys), (self.values, values)):
            store[layer][rows, :, self.lengths] = new[:, :, 0]
        return self.keys[layer][: len(keys), :, :longest], self.values[layer][: len(keys), :, :longest]


class Batch:
    """The sequences that decode together. `join` reads a prompt, `step` adds one token to each, `leave` removes one."""

    def __init__(self, model: nn.Module, rows: int, context: int):
        self.model = model
        self.rows = rows
        self.cache = RowCache(rows, context)
        self.sequences: list[Sequence] = []

    @torch.inference_mode()
    def join(self, sequence: Sequence) -> None:
        """Read the prompt (alone, exactly as `generate` does) and choose the first token."""
        ids = torch.tensor([sequence.prompt], device=self.model.device)
        out = self.model(input_ids=ids, past_key_values=DynamicCache(config=self.model.config), logits_to_keep=1)
        self.cache.append(out.past_key_values)
        self.sequences.append(sequence)
        sequence.tokens.append(sequence.choose(out.logits[0, -1]))

    @torch.inference_mode()
    def step(self) -> None:
        """One forward pass that gives every sequence its next token."""
        lengths = torch.tensor(self.cache.lengths, device=self.model.device)
        positions = torch.arange(max(self.cache.lengths) + 1, device=self.model.device)
        out = self.model(
            input_ids=torch.tensor([[s.tokens[-1]] for s in self.sequences], device=self.model.device),
            position_ids=lengths[:, None],
            attention_mask=(positions <= lengths[:, None])[:, None, None],  # [rows, 1, 1, longest]: not the padding
            past_key_values=self.cache,
        )
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        for sequence, logits in zip(self.sequences, out.logits[:, -1], strict=True):
            sequence.tokens.append(sequence.choose(logits))

    @torch.inference_mode()
    def leave(self, sequence: Sequence) -> None:
        """Drop a sequence, finished or not."""
        row = self.sequences.index(sequence)
        self.cache.remove(row)
        self.sequences[row] = self.sequences[-1]
        self.sequences.pop()
