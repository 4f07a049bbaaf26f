"""Model folders on disk: saved whole or not at all, described by `artifact.json`, checked when loaded.

Notebooks hand models to one another only through these folders.
"""

import functools
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.course.files import recover, whole_folder

DESCRIPTION = "artifact.json"


@dataclass(frozen=True)
class Artifact:
    """A saved model: its folder and what `artifact.json` says of it."""

    folder: Path
    method: str  # how it was made, such as "gptq"
    settings: dict  # of the method
    parent: str  # name of the artifact it was made from
    weight_bytes: int  # of the .safetensors files, read off the disk
    sha256: str  # of the .safetensors files, in order of name

    @property
    def name(self) -> str:
        return self.folder.name


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


@functools.cache
def _hash_of_versions(versions: tuple[tuple[Path, int, int], ...]) -> str:
    """The hash of files, read once per process and version of them: each given with its size and time of change."""
    return _hash([file for file, *_ in versions])


def save(
    folder: Path,
    write: Callable[[Path], None],
    *,
    method: str,
    settings: dict,
    parent: str,
    expected_bytes: int = 0,
) -> Artifact:
    """Let `write(path)` fill a new folder, describe it, and put it in place of `folder`.

    It is written aside and renamed when complete: an interruption leaves the previous artifact or none, never half,
    and what fails leaves nothing.
    Raises OSError before writing when the disk has less than `expected_bytes` free, ValueError where `write` leaves no
    weights.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder.parent).free
    if free < expected_bytes:
        raise OSError(
            f"Saving {folder.name} takes {expected_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free. "
            "Free some space, then run the cell again."
        )
    with whole_folder(folder) as new:
        write(new)
        files = _weight_files(new)
        if not files:
            raise ValueError(f"Saving {folder.name} wrote no .safetensors file: a model's weights belong in one.")
        description = {
            "method": method,
            "settings": settings,
            "parent": parent,
            "weight_bytes": sum(file.stat().st_size for file in files),
            "sha256": _hash(files),
        }
        (new / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return Artifact(folder, **description)


def load(folder: Path, made_by: str = "") -> Artifact:
    """The artifact in `folder`, the bytes of its weights checked against the hash that `artifact.json` holds.

    Raises FileNotFoundError naming the notebook `made_by` that makes it, or ValueError when files are damaged.
    """
    recover(folder)
    if not (folder / DESCRIPTION).exists():
        hint = f" Run notebook {made_by} first." if made_by else ""
        raise FileNotFoundError(f"There is no saved model {folder.name!r}.{hint}")
    artifact = Artifact(folder, **json.loads((folder / DESCRIPTION).read_text(encoding="utf-8")))
    versions = tuple((f, f.stat().st_size, f.stat().st_mtime_ns) for f in _weight_files(folder))
    found = sum(size for _, size, _ in versions)
    if found != artifact.weight_bytes:
        raise _damaged(artifact, f"its weights are {found:,} bytes, {artifact.weight_bytes:,} expected", made_by)
    if _hash_of_versions(versions) != artifact.sha256:
        raise _damaged(artifact, "its weights are not the bytes that were saved (their SHA-256 differs)", made_by)
    return artifact


def _damaged(artifact: Artifact, why: str, made_by: str) -> ValueError:
    again = f"run notebook {made_by} again" if made_by else "make it again"
    return ValueError(f"Model {artifact.name!r} is damaged: {why}. Delete the folder and {again}.")
