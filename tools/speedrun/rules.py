"""What a submission to the speed-run may be, told by its files and by name before anything is computed."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from common.course import checkpoint

MODEL = "embedded"
BYTES = 115_000_000  # of model.safetensors: what 4 bits in groups of 64 take, embedding in 16 bits
CALIBRATION = 65_536  # tokens of the train split that a method may look at
STATEMENT = "submission.json"
WEIGHTS = "model.safetensors"
BESIDE = {  # what the course writes beside the weights; of these only the two configs are read
    *("config.json", "quantize_config.json", "generation_config.json", "artifact.json", STATEMENT),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt"),
}
STATED = {"name": str, "author": str, "method": str, "calibration_tokens": int}


class Refused(ValueError):
    """A submission that breaks a rule; the message says which."""


@dataclass(frozen=True)
class Statement:
    """What a submission says of itself. The tokens that it looked at are its word alone."""

    name: str
    author: str
    method: str
    calibration_tokens: int


def examine(folder: Path, most: int = BYTES) -> tuple[Statement, int]:
    """The statement of a submission and the bytes of its weights. Raises Refused."""
    if not folder.is_dir():
        raise Refused(f"{folder} is no folder. Submit the folder that save_gptq wrote.")
    for file in sorted(folder.iterdir()):
        if file.is_symlink():
            raise Refused(f"{file.name} is a link: its bytes lie elsewhere.")
        if file.is_dir() or file.name not in BESIDE | {WEIGHTS}:
            raise Refused(f"{file.name} does not belong there: weights go into {WEIGHTS}, and nothing else is read.")
    if not (folder / WEIGHTS).exists():
        raise Refused(f"There is no {WEIGHTS}.")
    size = (folder / WEIGHTS).stat().st_size
    if size > most:
        raise Refused(f"{WEIGHTS} has {size:,} bytes; {most:,} are allowed.")
    try:
        checkpoint.stored(folder)
    except ValueError as error:
        raise Refused(f"{WEIGHTS} is no whole safetensors file: {error}") from error
    if "auto_map" in _read(folder / "config.json"):
        raise Refused("config.json names code of its own (auto_map): the model must be one that transformers has.")
    return _stated(folder / STATEMENT), size


def fingerprint(folder: Path) -> str:
    """SHA-256 of a submission's weights."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stated(file: Path) -> Statement:
    content = _read(file)
    for name, kind in STATED.items():
        if type(content.get(name)) is not kind or content[name] == "":
            raise Refused(f"{STATEMENT} should hold {name} ({kind.__name__}).")
    if any(mark in str(content[name]) for name in STATED for mark in "|\n<>"):
        raise Refused(f"{STATEMENT} holds a character that a table cannot show (| < > or a line break).")
    stated = Statement(**{name: content[name] for name in STATED})
    if not 0 <= stated.calibration_tokens <= CALIBRATION:
        raise Refused(f"It looked at {stated.calibration_tokens:,} calibration tokens; {CALIBRATION:,} are allowed.")
    return stated


def _read(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{file.name} cannot be read as JSON ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise Refused(f"{file.name} should hold a JSON object.")
    return content
