"""Proofs, on a few tokens, that the model which a step hands on is the model that it meant."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from common.course.private import attention_of, set_attention
from common.methods.blocks import decoder_blocks


def few_tokens(model: nn.Module, count: int = 24) -> Tensor:
    """Token ids [1, count], spread over the vocabulary, on the model's device."""
    vocabulary = model.config.get_text_config().vocab_size
    return (torch.arange(1, count + 1, device=model.device) * 7919 % vocabulary)[None]


def same_logits(found: Tensor, expected: Tensor) -> bool:
    """Whether the difference is no more than rounding: one unit in the last place, in float32 a hundred thousandth."""
    if found.shape != expected.shape:
        return False
    limit = max(1e-5, torch.finfo(expected.dtype).eps)
    return ((found.float() - expected.float()).norm() <= limit * expected.float().norm()).item()  # false of NaN


@contextmanager
def evaluating(model: nn.Module):
    """Without dropout and gradients; the model is put back into the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """The model's logits [batch, seqlen, vocabulary]."""
    with evaluating(model):
        return model(input_ids=ids, use_cache=False).logits


def from_configuration(model: nn.Module, config=None) -> nn.Module:
    """The model that a configuration (by default the model's own) describes, with the very tensors of `model`.

    It is what loading the model again would give, and takes no memory. Raises ValueError when the configuration does
    not fit the weights, or a module's settings: a window, rotary positions or none, the kind of a block.
    """
    name, config = type(model).__name__, config or model.config
    try:
        with tempfile.TemporaryDirectory() as folder:
            config.save_pretrained(folder)
            config = type(config).from_pretrained(folder)
        set_attention(config, attention_of(model.config))
        with torch.device("meta"):
            described = type(model)(config).eval()
    except Exception as error:  # whatever a family makes of a configuration that it cannot be
        raise ValueError(f"The configuration of {name} describes no model that could be made ({error}).") from error
    tensors, wanted = _tensors(model), _tensors(described)
    different = {n for n, one in wanted.items() if n not in tensors or tensors[n].shape != one.shape}
    different |= tensors.keys() - wanted.keys()
    if different:
        raise ValueError(
            f"The configuration of {name} does not describe its weights: {len(different)} of them are missing, too "
            f"many, or of another shape ({min(different)})."
        )
    for mine, theirs in zip(decoder_blocks(model).modules(), decoder_blocks(described).modules(), strict=True):
        expected, found = _settings(theirs), _settings(mine)
        wrong = [key for key in expected.keys() & found.keys() if expected[key] != found[key]]
        if wrong:
            raise ValueError(
                f"The configuration of {name} describes another model: {min(wrong)} of a {type(mine).__name__} is "
                f"{expected[min(wrong)]} there, and {found[min(wrong)]} here."
            )
    modules = dict(described.named_modules())
    for path in wanted:
        owner, _, attribute = path.rpartition(".")
        owner, mine = modules[owner], tensors[path].detach()
        is_parameter = isinstance(getattr(owner, attribute), nn.Parameter)
        setattr(owner, attribute, nn.Parameter(mine, requires_grad=False) if is_parameter else mine)
    return described


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    named = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    return dict(named)


def _settings(module: nn.Module) -> dict:
    """The plain attributes of a module."""
    plain = bool, int, float, str, type(None)
    return {key: value for key, value in vars(module).items() if key != "training" and isinstance(value, plain)}


def require_same_from_configuration(model: nn.Module, config=None) -> None:
    """Raise ValueError unless the configuration describes the model in memory: weights, settings, logits."""
    ids = few_tokens(model)
    if not same_logits(logits_of(from_configuration(model, config), ids), logits_of(model, ids)):
        raise ValueError(
            f"The configuration of {type(model).__name__} describes another model: its logits differ. Something is set "
            "there in a way that this course does not know."
        )


def require_same_when_loaded(folder: Path, model: nn.Module) -> None:
    """Raise ValueError unless the checkpoint in `folder` loads as `model`, its weights rounded to the saved type."""
    loaded, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    mine, theirs = model.state_dict(), loaded.state_dict()
    wrong = {*info["missing_keys"], *info["unexpected_keys"], *(mine.keys() ^ theirs.keys())}
    for name in mine.keys() & theirs.keys():
        if not torch.equal(mine[name].cpu().to(loaded.dtype), theirs[name].to(loaded.dtype)):
            wrong.add(name)
    if wrong:
        raise ValueError(
            f"{type(model).__name__} would load as another model than the one that was saved: {len(wrong)} weights are "
            f"missing, too many, or others ({min(wrong)})."
        )
    require_same_from_configuration(model, loaded.config)
