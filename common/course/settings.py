"""Settings: one table of numbers (`profiles.toml`), turned into a typed object per lab; seeds and folders.

A notebook asks for `profile="auto"`: a GPU gives `gpu` (or, for a model that fills the card, `gpu16`:
`environment.choose_profile`), otherwise `cpu`. Profiles differ in numbers only.
"""

import dataclasses
import os
import random
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
CHAPTER = ROOT / "03-Model_Compression"
LARGE = "gpu16"
PROFILES = ("smoke", "cpu", "gpu", LARGE)
INSTEAD = {LARGE: "gpu"}  # whose number holds where a profile has none of its own
_TABLE = Path(__file__).with_name("profiles.toml")


@dataclass(frozen=True)
class Settings:
    """What every lab has. The values and their meaning stand in `profiles.toml`."""

    lab: str
    profile: str
    model: str  # a spec for common.course.assets
    seed: int
    corpus: str
    seqlen: int
    eval_windows: int
    sweep_windows: int
    max_new_tokens: int
    latency_runs: int
    batch_sizes: list
    context_tokens: int
    documentation: dict = field(repr=False, compare=False)  # name → meaning
    notebook: str = field(default="", kw_only=True)  # which one asked, such as "02-Quantize"

    @property
    def device(self) -> torch.device:
        """The GPU where there is one; the `smoke` and `cpu` profiles compute on the CPU everywhere."""
        return torch.device("cuda" if self.profile in ("gpu", LARGE) else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where the processor computes in it (all recent GPUs, AVX512-BF16 or AMX CPUs), else float32."""
        if self.device.type == "cuda":
            return torch.bfloat16
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32

    @property
    def artifacts(self) -> Path:
        """Folder of the models saved by this profile's notebooks."""
        return work_folder() / "artifacts" / slug(self.model) / self.profile

    def replace(self, **changes) -> "Settings":
        """A copy with other values, for trying things out: `settings.replace(nsamples=16)`."""
        return dataclasses.replace(self, **changes)

    def values(self) -> dict:
        """Name → value of everything that comes from `profiles.toml`."""
        return {name: getattr(self, name) for name in self.documentation}


def slug(text: str) -> str:
    """A folder name for a model spec or a device: letters, digits, dots and dashes."""
    return "-".join("".join(c if c.isalnum() or c == "." else " " for c in text.lower()).split())


def work_folder() -> Path:
    """Where runs keep what git does not: models, executed notebooks, fresh results (COURSE_WORK overrides)."""
    return Path(os.environ.get("COURSE_WORK", ROOT / ".work"))


def resolve_profile(profile: str) -> str:
    """`auto` becomes `gpu` or `cpu`; a profile that cannot run here, or does not exist, is refused."""
    if profile == "auto":
        return "gpu" if torch.cuda.is_available() else "cpu"
    if profile not in PROFILES:
        raise ValueError(f"Unknown profile {profile!r}; choose auto, {', '.join(PROFILES)}.")
    if profile in ("gpu", LARGE) and not torch.cuda.is_available():
        raise RuntimeError(
            f'Profile {profile!r} needs an NVIDIA GPU and PyTorch sees none. Use PROFILE = "cpu", or check that '
            "nvidia-smi works and that torch.version.cuda is not None."
        )
    return profile


def _table() -> dict[str, dict]:
    return tomllib.loads(_TABLE.read_text(encoding="utf-8"))


def labs() -> list[str]:
    """The labs that `profiles.toml` has numbers for: "quantization", "pruning", "distillation"."""
    return [name for name in _table() if name != "shared"]


def shared_rows() -> list[str]:
    """Names of the numbers that all labs have."""
    return list(_table()["shared"])


def _rows(lab: str) -> dict[str, dict]:
    table = _table()
    if lab == "shared" or lab not in table:
        raise ValueError(f"Unknown lab {lab!r}; choose {', '.join(labs())}.")
    return table["shared"] | table[lab]


def profile_values(lab: str, profile: str) -> dict:
    """Name → value of a lab's numbers at a profile, as they stand in `profiles.toml`."""
    return {name: _value(row, profile) for name, row in _rows(lab).items()}


def _value(row: dict, profile: str):
    """A profile's own number, else that of the profile it falls back on, else the one for all; None without any."""
    return next((row[key] for key in (profile, INSTEAD.get(profile), "all") if key in row), None)


def load_settings(lab: str, profile: str = "auto", model: str = "embedded") -> Settings:
    """The settings of `lab` at `profile`: a `Settings` with a typed attribute for every row of `profiles.toml`.

    A row without a value for every profile, or with values of different types, raises TypeError.
    """
    profile = resolve_profile(profile)
    fields = {field.name: field.type for field in dataclasses.fields(Settings)}
    for name, row in _rows(lab).items():
        values = [_value(row, each) for each in PROFILES]
        expected = fields.get(name, type(values[0]))
        for value in values:
            if type(value) is not expected or value is None:
                raise TypeError(f"profiles.toml: {name} = {value!r} should be of type {expected.__name__}.")
    values = profile_values(lab, profile)
    own = [(name, type(value)) for name, value in values.items() if name not in fields]
    settings = dataclasses.make_dataclass(f"{lab.title()}Settings", own, bases=(Settings,), frozen=True)
    documentation = {name: row["doc"] for name, row in _rows(lab).items()}
    return settings(lab=lab, profile=profile, model=model, documentation=documentation, **values)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch (CPU and GPU)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
