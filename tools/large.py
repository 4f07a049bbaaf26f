"""The chapter's table of the 7B run on a 16 GB card: `results/large.json`, as `tools/recording/large.py` writes it."""

import json

from common.course.settings import ROOT

FILE = ROOT / "results" / "large.json"
CARDS = (8, 12, 16, 24)  # GB
RESERVED = 1  # GiB that CUDA and the display take of a card


def table() -> str:
    """Peaks and time of each notebook, and what fits which card; a sentence where nothing has been recorded yet."""
    if not FILE.exists():
        return "（尚無紀錄：在 GPU 主機上執行 `tools/recording/large.py` 後產生。上面的算式是估計，不是量測。）\n"
    found = json.loads(FILE.read_text(encoding="utf-8"))
    done = [row for row in found["rows"] if row["state"] == "done"]
    lines = [
        "| Notebook | 時間，秒 | GPU 記憶體，GiB | 主記憶體，GiB | 其中沒有檔案可退回的 |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in done:
        name, beside = row["notebook"].replace("-", " · "), "＊" if row["side_by_side"] else ""
        sizes = (f"{row[key]:.1f}" for key in ("card", "resident", "anonymous"))
        lines.append(f"| Lab {name} | {row['seconds']:.0f}{beside} | {' | '.join(sizes)} |")
    fitting = []
    for size in CARDS:
        names = [row["notebook"].replace("-", " · ") for row in done if row["card"] <= size - RESERVED]
        which = "全部" if len(names) == len(done) else "、".join(names) or "沒有一個"
        fitting.append(f"- {size} GB：{which}")
    missing = [row["notebook"].replace("-", " · ") for row in found["rows"] if row["state"] != "done"]
    left = f"沒有跑完的：{'、'.join(missing)}。" if missing else ""
    note = (
        f"\n*{found['device']}，PyTorch 的配置上限 {found['limit']} GiB，{found['date']}；"
        f"Llama-2-7B 與 TinyLlama 的形狀，亂數權重，`gpu16` 的數字。"
        f"＊：三個 Lab 同時在同一張卡上跑，單獨跑較快。{left}*\n\n"
        f"以尖峰算，每張卡（留 {RESERVED} GiB 給 CUDA）放得下的 notebook：\n\n"
    )
    return "\n".join(lines) + "\n" + note + "\n".join(fitting) + "\n"
