"""Continuous batching: sequences of different lengths decode together, and join and leave between two tokens.

Reading the weights dominates a decoding step, and one reading serves every sequence of the batch. A batch that waited
for its longest member would waste that; here a finished sequence makes room at once (Orca, Yu et al., OSDI 2022).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from common.course.private import attention_of

COLDEST = 1e-3  # below this temperature the most likely token is certain, and dividing by it overflows
PROOF = ([1, 2, 3, 4, 5, 6, 7], [3, 1, 2])  # prompts of two lengths
PROOF_TOKENS = 6


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

    def get_seq_length(self, layer: int = 0) -> int:
        """Of the longest row, which is what some models ask for; where each row stands, `position_ids` say."""
        return max(self.lengths, default=0)

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
        # Without the configuration: with it, layers with a sliding window would keep the end of a long prompt only.
        out = self.model(input_ids=ids, past_key_values=DynamicCache(), use_cache=True)
        self.cache.append(out.past_key_values)
        self.sequences.append(sequence)
        sequence.tokens.append(sequence.choose(out.logits[0, -1]))

    @torch.inference_mode()
    def step(self) -> Tensor:
        """One forward pass that gives every sequence its next token; the logits it came from [rows, vocabulary]."""
        lengths = torch.tensor(self.cache.lengths, device=self.model.device)
        positions = torch.arange(max(self.cache.lengths) + 1, device=self.model.device)
        out = self.model(
            input_ids=torch.tensor([[s.tokens[-1]] for s in self.sequences], device=self.model.device),
            position_ids=lengths[:, None],
            attention_mask=self._masks(lengths[:, None], positions),
            past_key_values=self.cache,
        )
        self.cache.lengths = [length + 1 for length in self.cache.lengths]
        for sequence, logits in zip(self.sequences, out.logits[:, -1], strict=True):
            sequence.tokens.append(sequence.choose(logits))
        return out.logits[:, -1]

    def _masks(self, lengths: Tensor, positions: Tensor) -> Tensor | dict[str, Tensor]:
        """What each row's new token may look at [rows, 1, 1, longest]: no padding, and no further back than a window.

        Families whose layers differ take a mask for each kind of layer.
        """
        config = self.model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        everything = positions <= lengths
        nearby = everything & (positions > lengths - window) if window else everything
        masks = {"full_attention": everything, "sliding_attention": nearby}
        masks = {kind: self._as_attention_wants(mask[:, None, None]) for kind, mask in masks.items()}
        kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])
        return masks if len(kinds) > 1 else masks[kinds.pop()]

    def _as_attention_wants(self, mask: Tensor) -> Tensor:
        """Boolean, or as what is added to the scores where attention is computed by transformers' plain code."""
        if attention_of(self.model.config) != "eager":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)

    @torch.inference_mode()
    def leave(self, sequence: Sequence) -> None:
        """Drop a sequence, finished or not."""
        row = self.sequences.index(sequence)
        self.cache.remove(row)
        self.sequences[row] = self.sequences[-1]
        self.sequences.pop()

    def clear(self) -> None:
        """Drop everything, keys and values too: after a failure nobody knows what they hold."""
        self.cache = RowCache(self.rows, self.cache.context)
        self.sequences = []


@torch.inference_mode()
def require_batchable(model: nn.Module) -> None:
    """Raise ValueError, by name, unless two sequences that decode together get the logits that each gets alone.

    A cache of rows suits attention over keys and values at given positions. Models that keep a state of another kind,
    or read positions off the mask, would answer, but not as they should: a few tokens show it.
    """
    kind = type(model).__name__
    longer = getattr(model.config.get_text_config(), "sliding_window", None) or 0
    length = max(map(len, PROOF)) + PROOF_TOKENS
    prompts = [list(prompt) * (1 + longer // 4 if longer < 64 else 1) for prompt in PROOF]  # beyond a tiny window
    refusal = f"{kind} cannot be served by this engine: its answers in a batch are not those it gives alone. Use vLLM."
    try:
        batch = Batch(model, len(prompts), max(map(len, prompts)) + length)
        sequences = [Sequence(prompt, PROOF_TOKENS) for prompt in prompts]
        for sequence in sequences:
            batch.join(sequence)
        for _ in range(PROOF_TOKENS - 1):
            together = batch.step()
        alone = [model(input_ids=torch.tensor([s.prompt + s.tokens[:-1]], device=model.device)) for s in sequences]
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{refusal} ({type(error).__name__}: {str(error)[:120]})") from error
    alone = torch.stack([out.logits[0, -1] for out in alone])
    allowed = 8 * torch.finfo(alone.dtype).eps ** 0.5 * alone.float().std()
    if not (together.float() - alone.float()).abs().max() <= allowed:
        raise ValueError(refusal)
