"""The original's results, measured once and kept on disk: every notebook compares with them.

They are found again by what they depend on: the model's files, the test tokens, the number type, and the code that
measures. One number per profile: what a sweep measures on fewer windows is compared with `Quality.first` of them.
"""

import hashlib
import inspect
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.course.assets import locate
from common.course.files import whole_file
from common.course.settings import Settings, slug, work_folder
from common.measure import evaluation
from common.measure.evaluation import Baseline, Quality, evaluate

KEPT = 4  # references on disk; the oldest goes first. One of 24 windows of 512 tokens with its logits takes 1.2 GB


def original(settings: Settings, windows: Tensor, model: nn.Module, *, keep: int = 0) -> tuple[Quality, Baseline]:
    """The original's Quality on `windows` and its logits on the first `keep` of them, measured if not kept."""
    keep = min(keep, len(windows))
    file = work_folder() / "references" / f"{slug(settings.model)}-{_key(settings, windows)}.safetensors"
    if not file.exists() or _kept(file) < keep:
        baseline = Baseline(keep)
        _save(evaluate(model, windows, keep=baseline), baseline, file)
    return _load(file, keep)


def _key(settings: Settings, windows: Tensor) -> str:
    digest = hashlib.sha256(windows.numpy().tobytes())
    folder = Path(locate(settings.model))
    files = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(folder.glob("*.safetensors"))]
    code = [inspect.getsource(evaluation.evaluate), inspect.getsource(evaluation._logits)]
    for part in (settings.model, files, settings.dtype, settings.device.type, torch.__version__, code):
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _logits_of(window: int) -> str:
    return f"logits.{window:04}"


def _kept(file: Path) -> int:
    """Of how many windows a file holds the logits."""
    with safe_open(file, framework="pt") as tensors:
        return sum(name.startswith("logits.") for name in tensors.keys())  # noqa: SIM118


def _save(quality: Quality, baseline: Baseline, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = sorted(file.parent.glob("*.safetensors"), key=lambda f: f.stat().st_mtime)
    for old in kept[: max(0, len(kept) - KEPT + 1)]:
        old.unlink()
    tensors = {"losses": quality.losses, "hits": quality.hits, "choices": quality.choices}
    tensors |= {_logits_of(number): logits.contiguous() for number, logits in enumerate(baseline.logits)}
    needed, free = sum(t.nbytes for t in tensors.values()), shutil.disk_usage(file.parent).free
    if free < needed:
        raise OSError(f"Keeping the original's results takes {needed / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB.")
    with whole_file(file) as new:
        save_file(tensors, new)


def _load(file: Path, keep: int) -> tuple[Quality, Baseline]:
    with safe_open(file, framework="pt") as tensors:
        losses, hits, choices = (tensors.get_tensor(name) for name in ("losses", "hits", "choices"))
        logits = [tensors.get_tensor(_logits_of(number)) for number in range(keep)]
    return evaluation.quality_of(losses, hits, choices), Baseline(len(logits), logits)
