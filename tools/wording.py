"""The words around the figures of a table: those of the Chinese documents, and those of the README.en.md files."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from common.course.settings import ROOT

LABELS = ROOT / "results" / "english.toml"
HAN = re.compile(r"[\u3400-\u9fff]")
ASCII = str.maketrans({"（": " (", "）": ")", "：": ": ", "，": ", "})


@dataclass(frozen=True)
class Wording:
    """What `tools.tables` writes in one language; `names`: of a protocol's entries."""

    names: dict[str, str]
    comma: str
    clause: str
    part: str
    none: str
    column: str
    device: str
    below: str
    protocol: str
    source: str
    span: str
    codes: str
    versions: str
    lacking: str
    warning: str
    english: bool = False

    def of(self, label: str) -> str:
        """A label or a format of tables.toml in this language. Raises ValueError where english.toml lacks it."""
        if not self.english:
            return label
        if not HAN.search(label):
            return label.translate(ASCII).replace("  (", " (")
        if label not in _labels():
            raise ValueError(f"{LABELS.relative_to(ROOT)} has no English for «{label}».")
        return _labels()[label]


@cache
def _labels() -> dict[str, str]:
    return tomllib.loads(LABELS.read_text(encoding="utf-8"))


CHINESE = Wording(
    names={
        "corpus": "語料",
        "split": "切分",
        "seqlen": "視窗長度",
        "windows": "測試視窗",
        "nsamples": "校準視窗",
        "dtype": "型別",
        "against": "對照",
        "context": "脈絡長度",
        "batch": "批次",
        "steps": "步數",
        "tokens": "token 數",
        "items": "題數",
        "task": "任務",
        "chance": "瞎猜",
        "what": "大小的定義",
        "sparsity": "稀疏度",
        "bits": "位元數",
        "shape": "形狀",
        "runs": "次數",
        "seed": "種子",
    },
    comma="、",
    clause="，",
    part="；",
    none="（尚無紀錄：執行 `make record` 後產生。）\n",
    column="{title}（{device}）",
    device="**{device}**：{title}。",
    below="{title}。{caption}",
    protocol="協定：{said}。",
    source="來源：`results/`，{span} 執行。",
    span="{first} 至 {last}",
    codes="程式的指紋不只一個（{devices}）",
    versions="套件版本不一：{found}",
    lacking="無",
    warning="⚠️ {said}。",
)
ENGLISH = Wording(
    names={"seqlen": "window", "windows": "test windows", "nsamples": "calibration windows", "what": "size of"},
    comma=", ",
    clause=", ",
    part="; ",
    none="(No record yet: `make record` makes them.)\n",
    column="{title} ({device})",
    device="**{device}**: {title}.",
    below="{title}. {caption}",
    protocol="Protocol: {said}. ",
    source="Source: `results/`, run {span}.",
    span="{first} to {last}",
    codes="several fingerprints of code ({devices})",
    versions="library versions differ: {found}",
    lacking="none",
    warning=" ⚠️ {said}.",
    english=True,
)


def wording(document: Path) -> Wording:
    """The language of a document, told by its name."""
    return ENGLISH if document.name.endswith(".en.md") else CHINESE
