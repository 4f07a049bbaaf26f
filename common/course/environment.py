"""What machine this is, what is installed on it, and how much of it a notebook used."""

import contextlib
import html
import importlib.metadata
import importlib.util
import io
import json
import logging
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
import transformers
from IPython.display import display

from common.course import claims
from common.course.assets import model_bytes
from common.course.memory import GIB, cap_gpu_memory, card_memory, gpu_peak, host_peak, keep_freed_memory
from common.course.settings import CHAPTER, LARGE, Settings, load_settings, resolve_profile, seed_everything

PACKAGES = (
    "torch",
    "transformers",
    "gptqmodel",
    "optimum",
    "accelerate",
    "datasets",
    "bitsandbytes",
    "torchao",
    "torch-pruning",
)
NOISY_LOGGERS = ("tokenicer", "transformers", "bitsandbytes", "optimum", "datasets")
_started = time.perf_counter()


def _quiet() -> None:
    """Silence libraries that greet on import; their errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # GPTQModel starts worker pools sized for servers and dies on a machine with fewer cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(max(2, os.cpu_count() or 2)))
    transformers.utils.logging.disable_progress_bar()
    with contextlib.redirect_stdout(io.StringIO()):
        from logbar import LogBar  # GPTQModel's; greets on import where it takes the terminal for a CI

        LogBar.shared().setLevel("ERROR")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
    warnings.filterwarnings("ignore", message="You passed `quantization_config`")  # the backend we ask for is used
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)


_quiet()  # here, not in `prepare`: what the same cell imports after this module greets already


def prepare(
    lab: str, notebook: str, profile: str = "auto", model: str = "embedded", student: str = "layers"
) -> Settings:
    """First step of every notebook: settings, seeds and memory cap; shows the values that it uses, folded.

    lab: as in `profiles.toml`; notebook: the file's name without .ipynb, such as "02-Quantize"; student: Lab 3.3's,
    whose claims the course vouches for only where it is made of the teacher's layers.
    """
    global _started
    _started = time.perf_counter()
    settings = load_settings(lab, choose_profile(profile, model), model).replace(notebook=notebook)
    seed_everything(settings.seed)
    cap_gpu_memory()
    keep_freed_memory()
    claims.about(model, student)
    print(f"profile {settings.profile} · model {model} · {device_name(settings)} · {str(settings.dtype)[6:]}")
    _show_settings(settings)
    return settings


def choose_profile(profile: str, model: str) -> str:
    """`auto` goes by the hardware, and on a GPU by the model: one that fills a quarter of the card gets fewer numbers.

    It says so in a line. Other profiles stay what they are; raises what `settings.resolve_profile` raises.
    """
    chosen = resolve_profile(profile)
    if profile == "auto" and chosen == "gpu" and (size := model_bytes(model)) > card_memory() / 4:
        chosen = LARGE
        card = card_memory() / GIB
        print(f"profile {chosen}: in 16 bits this model is {size / GIB:.1f} GiB, the card has {card:.0f}")
    return chosen


def _show_settings(settings: Settings) -> None:
    """The rows of `profiles.toml` that the notebook names, folded; as text where HTML is not shown."""
    named = _names_used(settings)
    used = {name: value for name, value in settings.values().items() if name in named}
    text = "\n".join(f"{name:17} {value!s:38} {settings.documentation[name]}" for name, value in used.items())
    folded = f"<details><summary>settings of this notebook</summary><pre>{html.escape(text)}</pre></details>"
    display({"text/plain": text, "text/html": folded}, raw=True)


def _names_used(settings: Settings) -> set[str]:
    """Names after `settings.` in the code of the notebook's file; all of them where there is no such file."""
    folders = [f"Lab-*-{settings.lab.title()}", settings.lab.title()]
    files = [f for folder in folders for f in CHAPTER.glob(f"{folder}/{settings.notebook}.ipynb")]
    if not files:
        return set(settings.values())
    cells = json.loads(files[0].read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return set(re.findall(r"\bsettings\.(\w+)", code))


def cpu_name() -> str:
    """The processor's model name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:  # not Linux
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def device_name(settings: Settings) -> str:
    """The device that computes, as results are filed under: `NVIDIA H100 80GB HBM3`, or `AMD EPYC CPU, 2 cores`."""
    if settings.device.type == "cuda":
        return torch.cuda.get_device_name(0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cpu_name()} CPU, {cores} cores"


def versions() -> dict[str, str]:
    """Installed versions of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES if _version(name)}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True)
class Check:
    """One line of the environment report."""

    name: str
    good: bool
    found: str
    advice: str = ""
    required: bool = True  # without it the notebooks cannot run; otherwise they run, but worse

    def __str__(self) -> str:
        mark = "✅" if self.good else "❌" if self.required else "⚠️"
        line = f"{mark} {self.name:14} {self.found}"
        return line if self.good or not self.advice else f"{line}\n   → {self.advice}"


def report(settings: Settings) -> list[Check]:
    """Check Python, hardware and packages; print one line each with advice where something is missing."""
    checks = [
        Check("Python", (3, 11) <= sys.version_info < (3, 14), platform.python_version(), "3.11 to 3.13 are needed."),
        Check(
            "CPU", True, f"{cpu_name()}, {os.cpu_count()} logical cores, {psutil.virtual_memory().total / GIB:.0f} GiB"
        ),
        *_gpu_checks(settings),
    ]
    install = "Run `make setup` (or pip install -r requirements.txt), then restart the kernel."
    checks += [Check(name, bool(_version(name)), _version(name) or "not installed", install) for name in PACKAGES]
    print("\n".join(map(str, checks)))
    return checks


def require(checks: list[Check]) -> None:
    """Raise RuntimeError naming what `report` found missing without which the notebooks cannot run."""
    failed = [check.name for check in checks if check.required and not check.good]
    if failed:
        raise RuntimeError(f"Fix these first: {', '.join(failed)} (advice above).")
    print("✅ environment ready")


def _gpu_checks(settings: Settings) -> list[Check]:
    if not torch.cuda.is_available():
        without = f"none; profile {settings.profile} computes on the CPU"
        driver = driver_version()
        advice = f"Driver {driver} is there but PyTorch {torch.__version__} sees no GPU: install its CUDA build."
        return [Check("GPU", not driver, without, advice, required=False)]
    properties = torch.cuda.get_device_properties(0)
    memory = properties.total_memory / GIB
    capability = f"{properties.major}.{properties.minor}"
    return [
        Check("GPU", True, f"{properties.name}, {memory:.0f} GiB, compute capability {capability}"),
        Check("GPU memory", memory > 14, f"{memory:.1f} GiB", "The profiles are made for 16 GB.", required=False),
        Check("CUDA", True, f"driver {driver_version()}, PyTorch built for CUDA {torch.version.cuda}"),
        Check("bfloat16", properties.major >= 8, capability, "Before Ampere (8.0), bfloat16 is slow.", required=False),
    ]


def driver_version() -> str:
    """NVIDIA driver version, or "" where nvidia-smi is missing or fails."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split()[0]
    except (FileNotFoundError, subprocess.SubprocessError, IndexError):
        return ""


@dataclass(frozen=True)
class Usage:
    """What a notebook used since `prepare`."""

    seconds: float
    memory_bytes: int  # peak of the process in main memory
    gpu_bytes: int  # peak of PyTorch's allocator; 0 without a GPU


def usage() -> Usage:
    """Wall-clock seconds and peak memory of this kernel since `prepare`."""
    return Usage(time.perf_counter() - _started, host_peak(), gpu_peak())
