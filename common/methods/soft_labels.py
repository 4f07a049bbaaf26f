"""Soft labels: a teacher's next-token distributions, computed once and kept on disk.

Of each distribution the k likeliest tokens are kept with their log-probabilities, and the log-probability of all
others together. Without that last number the student would learn that the tail does not exist (arXiv:2503.16870).
The files are memory-mapped: training reads what it needs, and making them can be interrupted and resumed.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from common.course.checkpoint import checksums
from common.course.files import write_whole

DESCRIPTION = "soft_labels.json"


@dataclass(frozen=True)
class SoftLabels:
    """Memory-mapped arrays over windows of `seqlen` tokens; position i holds the distribution of token i + 1.

    ids: uint16 (int32 beyond 65,536 tokens) [windows, seqlen - 1, k]; log_probs: float16 [windows, seqlen - 1, k + 1].
    """

    ids: np.ndarray
    log_probs: np.ndarray
    temperature: float

    @property
    def bytes_per_token(self) -> float:
        return (self.ids.nbytes + self.log_probs.nbytes) / self.ids[..., 0].size

    def batch(self, windows: list[int]) -> tuple[Tensor, Tensor]:
        """ids (int64) and log_probs (float32) of some windows, renormalized after their rounding to 16 bits."""
        ids = torch.from_numpy(self.ids[windows].astype(np.int64))
        return ids, torch.from_numpy(self.log_probs[windows].astype(np.float32)).log_softmax(-1)


class WindowDataset(Dataset):
    """Token windows [n, seqlen] with, if given, their soft labels. An item is an index: `collate` reads whole batches.

    shift: take the soft labels of the window `shift` places further on: a teacher that speaks of something else.
    Raises ValueError when empty.
    """

    def __init__(self, windows: Tensor, soft_labels: SoftLabels | None = None, shift: int = 0):
        if len(windows) == 0:
            raise ValueError("There are no windows to train on: the dataset is empty.")
        self.windows, self.soft_labels, self.shift = windows, soft_labels, shift

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> int:
        return index

    def collate(self, indices: list[int]) -> dict[str, Tensor]:
        batch = {"input_ids": self.windows[indices]}
        if self.soft_labels is not None:
            others = [(index + self.shift) % len(self) for index in indices]
            batch["top_ids"], batch["log_probs"] = self.soft_labels.batch(others)
        return batch


def fingerprint(teacher: nn.Module, tokenizer, windows: Tensor) -> dict[str, str]:
    """Hashes of what soft labels depend on: the teacher's weights, the tokenizer's vocabulary, the windows."""
    weights = hashlib.sha256()
    for name, sums in sorted(checksums(teacher).items()):
        weights.update(repr((name, sums)).encode())
    vocabulary = json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()
    return {
        "teacher": weights.hexdigest()[:16],
        "tokenizer": hashlib.sha256(vocabulary).hexdigest()[:16],
        "windows": hashlib.sha256(windows.contiguous().numpy()).hexdigest()[:16],
    }


def top_k_and_tail(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
    """ids [..., k] and log-probabilities [..., k + 1] of the k likeliest tokens and of all others together."""
    logits = logits.float() / temperature
    values, ids = logits.topk(k, dim=-1)
    other = logits.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat((values, other), dim=-1).log_softmax(-1)


def to_store(ids: Tensor, log_probs: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both on the CPU in the types that `SoftLabels` holds, for any vocabulary."""
    return ids.int().cpu().numpy(), log_probs.half().cpu().numpy()


def _open(folder: Path, shape: tuple[int, int], vocabulary: int, k: int, mode: str):
    ids_type = np.uint16 if vocabulary <= 1 << 16 else np.int32
    ids = np.memmap(folder / "ids.bin", ids_type, mode, shape=(*shape, k))
    return ids, np.memmap(folder / "log_probs.bin", np.float16, mode, shape=(*shape, k + 1))


@torch.no_grad()
def make_soft_labels(
    folder: Path, teacher: nn.Module, tokenizer, windows: Tensor, *, k: int, temperature: float, batch_size: int
) -> SoftLabels:
    """Compute the soft labels of windows [n, seqlen] into `folder`, going on where an interrupted run stopped.

    Raises ValueError when there is nothing to label, OSError when the disk is too full. Labels of another teacher,
    tokenizer, text, k or temperature in the same folder are replaced.
    """
    if len(windows) == 0:
        raise ValueError("There are no windows to label: the dataset is empty.")
    # Rows beyond the tokenizer's are padding, and a student with the same tokenizer may have fewer of them.
    vocabulary = min(teacher.config.get_text_config().vocab_size, 1 + max(tokenizer.get_vocab().values()))
    shape = len(windows), windows.shape[1] - 1
    if not 0 < k < vocabulary:
        raise ValueError(f"top_k must lie between 1 and {vocabulary - 1}, got {k}.")
    description = fingerprint(teacher, tokenizer, windows) | {
        "k": k,
        "temperature": temperature,
        "shape": list(shape),
        "vocabulary": vocabulary,
    }
    state = _read(folder)
    if {name: state.get(name) for name in description} != description:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        needed = shape[0] * shape[1] * ((2 if vocabulary <= 1 << 16 else 4) * k + 2 * (k + 1))
        if (free := shutil.disk_usage(folder).free) < needed:
            raise OSError(
                f"The soft labels take {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free. "
                "Free some space, or lower top_k."
            )
        state = description | {"done": 0}
        ids, log_probs = _open(folder, shape, vocabulary, k, "w+")
    else:
        ids, log_probs = _open(folder, shape, vocabulary, k, "r+")
    teacher.eval()
    bar = tqdm(total=len(windows), initial=state["done"], desc="soft labels", unit="window")
    for start in range(state["done"], len(windows), batch_size):
        batch = windows[start : start + batch_size].to(teacher.device)
        stop = start + len(batch)
        logits = teacher(input_ids=batch, use_cache=False).logits[:, :-1, :vocabulary]
        for row, one in enumerate(logits, start=start):
            ids[row], log_probs[row] = to_store(*top_k_and_tail(one, k, temperature))
        ids.flush()
        log_probs.flush()
        _write(folder, state | {"done": stop})  # after the data: what is marked done is on disk
        bar.update(len(batch))
    bar.close()
    return load_soft_labels(folder, fingerprint(teacher, tokenizer, windows))


def load_soft_labels(folder: Path, expected: dict[str, str], made_by: str = "") -> SoftLabels:
    """The soft labels in `folder`, if they are complete and belong to `expected` (of `fingerprint`).

    Raises FileNotFoundError when there are none, ValueError when unfinished or made from something else.
    """
    again = f" Run notebook {made_by} again." if made_by else ""
    state = _read(folder)
    if not state:
        raise FileNotFoundError(f"There are no soft labels in {folder.name!r}.{again}")
    other = [name for name, value in expected.items() if state[name] != value]
    if other:
        raise ValueError(f"The soft labels in {folder.name!r} were made from another {' and '.join(other)}.{again}")
    if state["done"] < state["shape"][0]:
        raise ValueError(f"Only {state['done']} of {state['shape'][0]} windows have soft labels.{again}")
    arrays = _open(folder, tuple(state["shape"]), state["vocabulary"], state["k"], "r")
    return SoftLabels(*arrays, state["temperature"])


def _read(folder: Path) -> dict:
    file = folder / DESCRIPTION
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _write(folder: Path, state: dict) -> None:
    write_whole(folder / DESCRIPTION, json.dumps(state, indent=2) + "\n")
