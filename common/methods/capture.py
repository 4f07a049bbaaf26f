"""What the decoder blocks of a model are called with, and the proof that calling them one by one is the same model."""

import copy
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from common.methods.experts import Matrix, block_linears, one_by_one, unfused
from common.methods.layer_lists import keep_layers

FAILURES = (LookupError, RuntimeError, TypeError, AttributeError, ValueError)  # of a model's code, called otherwise
PROOF_TOKENS = 32  # of the first window: enough to leave no difference in the code that runs unseen


class Halt(Exception):
    """Raised inside a forward pass to leave it once what was wanted has been seen."""


@contextmanager
def hooks(*handles):
    """Remove the hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_blocks(model: nn.Module, layers: int | None = None) -> nn.ModuleList:
    """The decoder blocks of a Hugging Face causal LM (Llama, Mistral, Qwen, Gemma, OPT, ...), in order.

    layers: how many there are, where the configuration does not say so yet.
    """
    layers = model.config.get_text_config().num_hidden_layers if layers is None else layers
    candidates = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no list of {layers} decoder blocks that could be walked.")
    return candidates[0]


@contextmanager
def blocks_replaced(model: nn.Module, replacement: nn.ModuleList):
    """Another list in the place of the decoder blocks, for a while."""
    blocks = decoder_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    owner, _, attribute = path.rpartition(".")
    setattr(model.get_submodule(owner), attribute, replacement)
    try:
        yield
    finally:
        setattr(model.get_submodule(owner), attribute, blocks)


def first_blocks(model: nn.Module, count: int) -> nn.Module:
    """A copy of `model` that ends after its first `count` blocks: small enough to study closely."""
    with blocks_replaced(model, decoder_blocks(model)[:count]):  # so that only these are copied
        shallow = copy.deepcopy(model)
    keep_layers(shallow.config.get_text_config(), list(range(count)))
    return shallow


@dataclass
class BlockInputs:
    """What blocks are called with: hidden states [batch, seqlen, hidden], and the other arguments of each block.

    The latter differ where attention does: some models (Qwen2, Gemma) have a sliding window in some blocks only.
    """

    hidden: Tensor
    calls: list[tuple[tuple, dict]] = field(default_factory=list)  # per block: positional after the first, by name


@dataclass(frozen=True)
class Block:
    """One decoder block with its matrices by name, to be called on its own."""

    index: int
    path: str  # in the model: `model.layers.7`
    module: nn.Module
    linears: dict[str, nn.Linear | Matrix]

    def __call__(self, batch: BlockInputs, device: torch.device) -> Tensor:
        """The hidden states after this block, on the device where the batch waits."""
        args, kwargs = batch.calls[self.index]
        with unfused(self.linears):
            out = self.module(batch.hidden.to(device), *args, **kwargs)
        return hidden_of(out).to(batch.hidden.device)


def walkable_blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks of a model, in order. Raises ValueError where one has no matrices that can be changed."""
    blocks = decoder_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    return [Block(i, f"{path}.{i}", block, block_linears(block)) for i, block in enumerate(blocks)]


def hidden_of(out) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple."""
    return out[0] if isinstance(out, tuple | list) else out


def _split(args: tuple, kwargs: dict) -> tuple[Tensor, tuple, dict]:
    """The hidden states, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def to_device(value, device, moved: dict):
    """Move the tensors inside an argument (a tensor, or a container of them) to `device`, each only once.

    `device` may also be a dtype, for those that hold floating-point numbers.
    """
    if isinstance(value, Tensor):
        if id(value) not in moved:
            skipped = isinstance(device, torch.dtype) and not value.is_floating_point()
            moved[id(value)] = value, value if skipped else value.to(device)  # the first keeps the id taken
        return moved[id(value)][1]
    if type(value) in (tuple, list):
        return type(value)(to_device(item, device, moved) for item in value)
    if type(value) is dict:
        return {key: to_device(item, device, moved) for key, item in value.items()}
    return value


@contextmanager
def stand_ins(blocks: nn.ModuleList, forward):
    """Blocks that compute nothing: block i is called as forward(i, hidden, args, kwargs)."""

    def stand_in(index):
        return lambda *args, **kwargs: forward(index, *_split(args, kwargs))

    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def capture(model, windows: Tensor, batch_size: int, device, store, extras: list[tuple | None]) -> list[BlockInputs]:
    """Run the part around the blocks (embedding, positions, masks) and keep what reaches them; they compute nothing.

    extras: what each block returns besides the hidden states (`Trace.extras`).
    """
    blocks, captured, moved = decoder_blocks(model), [], {}

    def forward(index, hidden, args, kwargs):
        if index == 0:
            moved.clear()
            captured.append(BlockInputs(hidden.to(store)))
        captured[-1].calls.append((to_device(args, device, moved), to_device(kwargs, device, moved)))
        if index == len(blocks) - 1:
            raise Halt
        return hidden if extras[index] is None else (hidden, *extras[index])

    home = model.get_input_embeddings().weight.device
    with stand_ins(blocks, forward):
        for ids in windows.split(batch_size):
            try:
                model(input_ids=ids.to(home), use_cache=False)
            except Halt:
                continue
    return captured


def without_tensors(value):
    """None in the place of every tensor inside a tuple: those of a few tokens would be wrong for any others."""
    if isinstance(value, tuple | list):
        return tuple(without_tensors(item) for item in value)
    return None if isinstance(value, Tensor) else value


@dataclass
class Trace:
    """A forward pass of a few tokens as the model does it."""

    entered: list[Tensor]  # what each block was given
    calls: list[tuple[tuple, dict]]
    extras: list[tuple | None]  # what each block returned besides the hidden states, without tensors; None: no tuple

    @property
    def tokens(self) -> int:
        return self.entered[0].shape[1]


@torch.no_grad()
def trace(model: nn.Module, windows: Tensor, blocks: list[Block] | None = None) -> Trace:
    """Run the first tokens of the first window, and prove that the blocks, called one by one, do what the model does.

    Each block is given what it was given in the model and must return the same, and that must be what the next block
    was given. The price is two passes of `PROOF_TOKENS` tokens. Raises ValueError, with the block, where it fails.
    """
    blocks, ids, name = blocks or walkable_blocks(model), windows[:1, :PROOF_TOKENS], type(model).__name__
    entered, left, order = [], [], []

    def watch(block):
        def hook(_, args, kwargs, out):
            order.append(block.index)
            entered.append(_split(args, kwargs)[0].clone())
            left.append(out)

        return block.module.register_forward_hook(hook, with_kwargs=True)

    home = model.get_input_embeddings().weight.device
    with hooks(*(watch(block) for block in blocks)):
        model(input_ids=ids.to(home), use_cache=False)
    if order != list(range(len(blocks))):
        raise ValueError(f"{name} does not call its {len(blocks)} blocks once each and in order: it cannot be walked.")
    extras = [without_tensors(out[1:]) if isinstance(out, tuple | list) else None for out in left]
    left = [hidden_of(out).clone() for out in left]
    try:
        calls = capture(model, ids, 1, home, home, extras)[0].calls
    except FAILURES as error:
        raise ValueError(f"{name} cannot be walked: its blocks hand on more than hidden states ({error}).") from error
    with one_by_one(model):
        for block, before, after, following in zip(blocks, entered, left, [*entered[1:], left[-1]], strict=True):
            if not after.isfinite().all():
                raise ValueError(f"Block {block.index} of {name} computes NaN or inf: are all its weights finite?")
            try:
                alone = block(BlockInputs(before, calls), home)
            except FAILURES as error:
                raise ValueError(f"{name} cannot be walked: block {block.index} fails on its own ({error}).") from error
            if not (same(alone, after) and same(alone, following)):
                raise ValueError(
                    f"{name} cannot be walked: block {block.index}, called on its own, does not hand the next one what "
                    "it does inside the model. Something passes between its blocks besides hidden states."
                )
    return Trace(entered, calls, extras)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two results differ by rounding only: by √ε of their size, as two orders of summation may."""
    tolerance = torch.finfo(other.dtype).eps ** 0.5
    return one.shape == other.shape and bool((one - other).norm() <= tolerance * other.norm())
